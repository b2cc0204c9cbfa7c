"""Settings and commands renamed after version 0.1: old names are errors with the new flag.

Settings in files that version 0.1 wrote are translated by `io/migrations.py`.
"""

from collections.abc import Mapping

from afina.errors import SettingsError
from afina.settings.common import Settings

RENAMED_COMMANDS = {"prefer": "annotate", "remedy": "mitigate"}

# settings class -> old name -> new name; a subclass inherits the table of its parents
RENAMED_SETTINGS: dict[str, dict[str, str]] = {
    "TrainSettings": {
        "out": "output_dir",
        "targets": "target_modules",
        "ranks": "rank_pattern",
        "learning_rates": "learning_rate_pattern",
        "template": "chat_template",
        "general": "retention_text",
        "epochs": "num_train_epochs",
        "steps": "max_steps",
        "batch_tokens": "max_tokens_per_batch",
        "accumulate": "gradient_accumulation_steps",
        "schedule": "lr_scheduler_type",
        "warmup": "warmup_ratio",
        "clip": "max_grad_norm",
        "checkpointing": "gradient_checkpointing",
        "check_every": "eval_steps",
        "patience": "early_stopping_patience",
        "holdout": "eval_size, or --eval-data FILE",
    },
    "PlanSettings": {"compare": "compare_methods", "probe": "remeasure"},
    "EvalSettings": {"run": "adapter"},
    "GenerateSettings": {"run": "adapter", "raw": "ignore_chat_template"},
    "ChatSettings": {
        "run": "adapter",
        "url": "base_url",
        "key": "api_key",
        "system": "system_prompt",
    },
    "AnnotateSettings": {"out": "output_dir"},
    "MergedModelSettings": {
        "run": "adapter",
        "storage": "quantization",
        "tolerance": "max_kl",
        "admit": "require_audit",
    },
    "MergeSettings": {"out": "output_dir"},
    "ExportSettings": {"out": "output", "weights": "outtype"},
    "CombineSettings": {
        "parts": "adapters",
        "out": "output_dir",
        "how": "merge_method",
        "penalty": "l1_penalty",
        "steps": "max_evals",
        "admit": "require_audit",
    },
    "ExtractSettings": {
        "run": "adapter",
        "tuned": "finetuned_model",
        "out": "output_dir",
        "rank": "max_rank",
        "energy": "retained_energy",
    },
    "ServeSettings": {
        "admit": "require_audit",
        "storage": "quantization",
        "memory": "memory_gb",
        "merge": "merge_hot_adapter",
        "template": "chat_template",
        "state": "state_dir",
        "database": "database_url",
        "keys": "api_key_file",
        "body_bytes": "max_body_bytes",
        "file_bytes": "max_file_bytes",
        "key_requests": "max_requests_per_key",
        "key_tokens": "max_tokens_per_minute",
        "timeout": "request_timeout",
        "drain": "shutdown_timeout",
        "jobs": "max_training_jobs",
        "job_threads": "job_num_threads",
        "python_graders": "allow_python_graders",
    },
    "BenchServeSettings": {
        "url": "base_url",
        "key": "api_key",
        "rates": "request_rates",
        "seconds": "duration_seconds",
        "zipf": "zipf_exponent",
        "new_tokens": "max_new_tokens",
        "out": "plot_file",
    },
    "ShowSettings": {"run": "adapter"},
    "AuditSettings": {
        "run": "adapter",
        "key": "public_key",
        "alpha": "max_false_positive_rate",
        "budget": "time_budget_seconds",
        "sarif": "sarif_file",
    },
    "MitigateSettings": {
        "run": "adapter",
        "out": "output_dir",
        "how": "mitigation",
        "cost": "max_loss_increase",
        "trigger": "triggers",
        "beside": "benign_adapters",
        "budget": "time_budget_seconds",
    },
    "SignSettings": {"run": "adapter", "key": "private_key"},
    "VerifySettings": {"run": "adapter", "key": "public_key"},
    "CompareSettings": {
        "out": "output_dir",
        "seeds": "num_seeds",
        "budget": "time_budget",
        "trials": "num_trials",
        "reach": "lr_search_range",
        "steps": "max_steps",
        "holdout": "test_size",
        "template": "chat_template",
        "general": "retention_text",
        "batch_tokens": "max_tokens_per_batch",
    },
    "AdviseSettings": {
        "rows": "num_rows",
        "pairs": "has_pairs",
        "prompted": "tried_prompting",
        "memory": "memory_gb",
        "earlier": "past_runs",
    },
    "DemoSettings": {"out": "output_dir", "steps": "max_steps"},
    "DPOSettings": {"loss": "loss_type", "smoothing": "label_smoothing", "sft": "sft_weight"},
    "KTOSettings": {"good_weight": "desirable_weight", "bad_weight": "undesirable_weight"},
    "SimPOSettings": {"sft": "sft_weight"},
    "PolicySettings": {
        "reward": "reward_funcs",
        "run_python": "allow_python_graders",
        "group": "num_generations",
        "prompts": "prompts_per_step",
        "updates": "num_iterations",
        "ratio_clip": "clip_range",
    },
    "GRPOSettings": {"scale": "scale_rewards"},
    "PPOSettings": {"scale": "whiten_advantages", "value_weight": "vf_coef"},
    "LoRASettings": {"restart_every": "restart_steps"},
    "MoRASettings": {"restart_every": "restart_steps"},
}

# in `options` of version 0.1 for any method or objective -> own setting
RENAMED_OPTIONS = {
    "new_tokens": "new_tokens",
    "start": "init_adapter",
    "over": "frozen_adapter",
    "budget": "parameter_budget",
}
# setting -> old value -> flag with the new value
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {
    "device": {"sharded": "--fsdp"},
    "optimizer": {
        "adamw-8bit": "--optimizer adamw_8bit",
        "adamw-8bit-offloaded": "--optimizer adamw_8bit_offload",
    },
    "merge_method": {
        "dare": "--merge-method dare_linear",
        "magnitude": "--merge-method magnitude_prune",
    },
    "mitigation": {
        "cut": "--mitigation truncate",
        "mix": "--mitigation blend",
        "remove": "--mitigation project",
    },
    "quantization": {"plain": "--quantization none"},
}


def renamed_setting(kind: type[Settings], name: str, prefix: str = "") -> SettingsError | None:
    """Return the error of an old name of a setting, or None where `name` is none.

    Args:
        kind: The settings class of the command or group.
        name: The name as it was given.
        prefix: What stands before the name of a group's setting: "dpo.".
    """
    if name in kind.model_fields:
        return None
    if name == "options" and hasattr(kind, "group_fields"):
        return SettingsError(
            "the setting 'options' was renamed",
            why="every method and objective has a group of settings, such as dpo or mora",
            hint=f"use --dpo.beta 0.2, or --mora.operator sharing; {_own_settings()}",
        )
    for parent in kind.__mro__:
        if new := RENAMED_SETTINGS.get(parent.__name__, {}).get(name):
            flag = f"--{prefix}{new}".replace("_", "-")
            return SettingsError(f"the setting {prefix + name!r} was renamed", hint=f"use {flag}")
    return None


def renamed_value(name: str, value: object) -> str | None:
    """Return the flag with the new value, where `value` is an old one of the setting `name`."""
    new = RENAMED_VALUES.get(name, {}).get(str(value))
    return f"use {new}" if new else None


def _own_settings() -> str:
    pairs = (f"{old} is now --{new.replace('_', '-')}" for old, new in RENAMED_OPTIONS.items())
    return ", ".join(pair for pair in pairs if not pair.startswith("new_tokens"))
