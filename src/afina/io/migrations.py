"""Tables that bring files of format version 1 (afina 0.1) to the names of today."""

from collections.abc import Mapping
from typing import Any

SETTINGS = {  # of a run: name in version 1 -> name today
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
}
OPTIMIZERS = {"adamw-8bit": "adamw_8bit", "adamw-8bit-offloaded": "adamw_8bit_offload"}


OPTIONS = {  # in `options` of version 1, for any method or objective -> own setting today
    "new_tokens": "new_tokens",
    "start": "init_adapter",
    "over": "frozen_adapter",
    "budget": "parameter_budget",
}
METHOD_OPTIONS = {"restart_every": "restart_steps"}
_PREFERENCE = {"loss": "loss_type", "smoothing": "label_smoothing", "sft": "sft_weight"}
_POLICY = {
    "reward": "reward_funcs",
    "run_python": "allow_python_graders",
    "group": "num_generations",
    "prompts": "prompts_per_step",
    "updates": "num_iterations",
    "ratio_clip": "clip_range",
}
_KEPT_POLICY = ("max_new_tokens", "temperature", "beta", "reference")
OBJECTIVE_OPTIONS: dict[str, dict[str, str]] = {  # objective -> name in `options` -> name today
    "dpo": _PREFERENCE | {"beta": "beta", "reference": "reference"},
    "kto": {"good_weight": "desirable_weight", "bad_weight": "undesirable_weight"}
    | {"beta": "beta", "reference": "reference"},
    "orpo": {"beta": "beta"},
    "simpo": {"beta": "beta", "gamma": "gamma", "sft": "sft_weight"},
    "grpo": _POLICY | dict(zip(_KEPT_POLICY, _KEPT_POLICY)) | {"scale": "scale_rewards"},
    "rloo": _POLICY | dict(zip(_KEPT_POLICY, _KEPT_POLICY)),
    "ppo": _POLICY
    | dict(zip(_KEPT_POLICY, _KEPT_POLICY))
    | {"scale": "whiten_advantages", "value_weight": "vf_coef", "gamma": "gamma", "lam": "lam"},
}


LOSSES = {  # `losses` of run.json: key in version 1 -> key today
    "held_before": "eval_loss_before",
    "held_after": "eval_loss_after",
    "train_before": "train_loss_before",
    "train_after": "train_loss_after",
    "general_before": "retention_loss_before",
    "general_after": "retention_loss_after",
    "held": "eval_change",
    "train": "train_change",
    "held_rows": "eval_rows",
    "held_interval": "eval_interval",
}


METRICS = {  # of metrics.jsonl and of the reports in run.json: name in version 1 -> name today
    "clipped": "clip_ratio",
    "reward_spread": "reward_std",
    "stopped": "stop_ratio",
    "value_error": "value_loss",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_logp": "logps/chosen",
    "rejected_logp": "logps/rejected",
}


def migrate_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics of version 1, those of a step or of a report, under the names of today."""
    new = {}
    for key, value in values.items():
        name = key.removeprefix("held_out_")
        new["eval_" * (name != key) + METRICS.get(name, name)] = value
    return new


def migrate_progress(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's progress.json under the names of today."""
    progress = rename_keys(values["progress"], {"worse_checks": "num_bad_evals"})
    losses = {"held_out": "eval_loss", "general": "retention_loss"}
    progress["before"] = rename_keys(progress.get("before", {}), losses)
    return {**values, "progress": progress}


def migrate_run_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run.json under the keys of today; one of version 2 comes back unchanged."""
    new = rename_keys(values, {"words": "units", "over": "frozen_adapter"})
    if "losses" in new:
        new["losses"] = rename_keys(new["losses"], LOSSES)
    if "settings" in new:
        version = values.get("format_version", 1)
        new["settings"] = migrate_settings({"format_version": version} | new["settings"])
    for group in {"preferences", "policy"} & new.keys():
        report = rename_keys(new[group], {"judges": "reward_functions"})
        if values.get("format_version", 1) == 1:
            for side in {"before", "after"} & report.keys():
                report[side] = migrate_metrics(report[side])
        if "start" in report:
            new["init_adapter"] = report.pop("start")
        new[group] = report
    return new


def migrate_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings under the names of today; those of version 2 come back unchanged."""
    new = {SETTINGS.get(name, name): value for name, value in values.items()}
    if new.pop("format_version", 1) != 1:
        return new
    if "holdout" in new:
        holdout = new.pop("holdout")
        is_ratio = isinstance(holdout, int | float) or str(holdout).replace(".", "", 1).isdigit()
        new |= {"eval_size": float(holdout)} if is_ratio else {"eval_data": str(holdout)}
    if new.get("device") == "sharded":
        new |= {"device": "auto", "fsdp": True}
    if new.get("optimizer") in OPTIMIZERS:
        new["optimizer"] = OPTIMIZERS[new["optimizer"]]
    if "options" in new:
        new |= migrate_options(
            new.pop("options") or {}, new.get("method", "lora"), new.get("objective", "auto")
        )
    return new


def migrate_options(values: Mapping[str, Any], method: str, objective: str) -> dict[str, Any]:
    """Return `options` of version 1 as settings of today: own ones, and groups by their names."""
    names = OBJECTIVE_OPTIONS.get(objective, {})
    group = method.removeprefix("q").removeprefix("a")
    new: dict[str, Any] = {}
    for name, value in values.items():
        if name in OPTIONS:
            new[OPTIONS[name]] = value
        elif name in names:
            new.setdefault(objective, {})[names[name]] = value
        else:
            new.setdefault(group, {})[METHOD_OPTIONS.get(name, name)] = value
    return new


# ---- comparisons: compare.json, and the files of a comparison that is resumed

COMPARISON_SETTINGS = {
    "seeds": "num_seeds",
    "budget": "time_budget",
    "trials": "num_trials",
    "reach": "lr_search_range",
    "steps": "max_steps",
    "holdout": "test_size",
    "template": "chat_template",
    "general": "retention_text",
    "batch_tokens": "max_tokens_per_batch",
}


def migrate_comparison_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a comparison under today's names; those of version 2 are unchanged."""
    renamed = rename_keys(settings, COMPARISON_SETTINGS)
    variants = renamed.get("variants") or {}
    return renamed | {"variants": {name: migrate_settings(own) for name, own in variants.items()}}


def migrate_comparison(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a compare.json under the keys of format version 2."""
    if "version" not in content:
        return dict(content)
    methods = {
        name: rename_keys(found, {"edge": "at_search_boundary"})
        for name, found in content.get("methods", {}).items()
    }
    tests = [rename_keys(test, {"shown": "significant"}) for test in content.get("tests", [])]
    found = rename_keys(content, {"version": "format_version"}) | {
        "format_version": 2,
        "settings": migrate_comparison_settings(content.get("settings", {})),
        "methods": methods,
        "tests": tests,
    }
    for name, keys in (
        ("schedule", {"spent": "seconds_spent"}),
        ("recommendation", {"alike": "indistinguishable"}),
    ):
        if name in content:
            found[name] = rename_keys(content[name], keys)
    return found


def migrate_judgement(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of judgements.jsonl under the keys of today."""
    answers = [rename_keys(answer, {"by": "responder"}) for answer in line["answers"]]
    return rename_keys(line, {"said": "choice"}) | {"answers": answers}


def rename_keys(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the mapping with its keys renamed, in the same order."""
    return {names.get(key, key): value for key, value in values.items()}
