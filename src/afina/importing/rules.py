"""What each tool's keys choose together: objective, method, bits of the base, and its own keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import SettingsError
from afina.importing.conversion import NO_EFFECT, Conversion
from afina.importing.data_sets import (
    axolotl_data,
    llama_factory_data,
    mlx_data,
    trl_data,
)
from afina.settings import POLICIES

DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust")
PROMPTS_NOTE = "of chats it counts every token by default; here only the answers are learned"
REWARDS_FILE = "rewards.py"
MLX_WEIGHT_DECAY = 0.01  # of its AdamW
NO_CLIPPING = 1e9  # a norm that no gradient has


def apply(tool: str, c: Conversion, trainer: str, folder: Path) -> tuple[str, str, bool]:
    """Apply the rules of a tool; return objective, method, and whether the base is in 4 bits.

    Args:
        tool: The tool.
        c: The keys.
        trainer: Kind of trainer of a script: sft, dpo, ...
        folder: Folder of the configuration.
    """
    if tool == "llama_factory":
        return _llama_factory(c, folder)
    if tool == "axolotl":
        return _axolotl(c)
    return _mlx(c) if tool == "mlx_lm" else _trl(c, trainer, tool == "unsloth")


def infer_trainer(tool: str, keys: Mapping[str, Any], given: str | None) -> str:
    """Return the kind of trainer, which YAML of TRL's scripts does not name."""
    if given is not None or tool not in ("trl", "trl_python", "unsloth"):
        return given or "sft"
    if keys.keys() & {"reward_funcs", "num_generations", "reward_model_name_or_path"}:
        return "grpo"
    if "desirable_weight" in keys:
        return "kto"
    is_dpo = "beta" in keys or keys.get("loss_type") in DPO_LOSSES
    return "dpo" if is_dpo else "sft"


def _trl(c: Conversion, trainer: str, is_unsloth: bool) -> tuple[str, str, bool]:
    trl_data(c)
    _prompt_losses(c, trainer)
    template = c.get("chat_template")
    if template is not None:
        c.comment("chat_template", "the base's own template is used; --chat-template FILE")
    uses_peft = bool(c.get("use_peft")) or (is_unsloth and not c.get("full_finetuning"))
    for name in ("use_peft", "full_finetuning"):
        if c.has(name):
            c.use(name, {"method": "lora" if uses_peft else "full"})
    if c.has("finetune_language_layers"):
        c.comment("finetune_language_layers")
    is_4bit = bool(c.get("load_in_4bit")) and uses_peft
    if is_4bit:
        c.use("load_in_4bit", {"method": "qlora"})
    else:
        c.comment("load_in_4bit")
    _preferences(c, trainer)
    return trainer, "lora" if uses_peft else "full", is_4bit


def _prompt_losses(c: Conversion, trainer: str) -> None:
    """Note whether prompts are learned, which only answers are here."""
    if trainer != "sft":
        return
    for name in ("completion_only_loss", "assistant_only_loss"):
        if c.get(name) is True:
            c.comment(name, "as always here")
        elif name == "completion_only_loss" and c.get(name) is False:
            c.missing(name, "only answers are learned")
        elif c.has(name):
            c.comment(name, PROMPTS_NOTE)


def _preferences(c: Conversion, objective: str) -> None:
    """Set the objective, and the settings of its group."""
    if objective == "sft":
        if c.get("loss_type") in (None, "nll", "chunked_nll"):
            c.comment("loss_type")
        return
    c.settings["objective"] = objective
    if objective in POLICIES:
        _policy(c, objective)
        return
    names = ["beta"] if objective != "reward" else []
    names += {
        "dpo": ["label_smoothing", "sft_weight"],
        "kto": ["desirable_weight", "undesirable_weight"],
        "simpo": ["sft_weight"],
    }.get(objective, [])
    group = {name: value for name in names if (value := c.get(name)) not in (None, 0, 0.0)}
    loss = c.get("loss_type")
    if objective == "dpo" and loss is not None:
        losses = loss if isinstance(loss, list) else [loss]
        if len(losses) == 1 and losses[0] in DPO_LOSSES:
            group["loss_type"] = losses[0]
        else:
            c.missing("loss_type", f"losses of dpo: {', '.join(DPO_LOSSES)}")
    if objective == "simpo":  # TRL's defaults are others
        group = {"beta": 0.1, "gamma": c.get("simpo_gamma", 0.5), **group}
    if c.get("precompute_ref_log_probs"):
        group["reference"] = "precomputed"
    own = {
        "gamma": "simpo_gamma",
        "reference": "precompute_ref_log_probs",
    }
    for name in group:
        c.use(own.get(name, name), {objective: group}, shown=(f"{objective}.{name}",))
    if group:
        c.settings[objective] = group
    if objective != "dpo" and c.has("loss_type"):
        c.comment("loss_type", f"the objective is {objective}")


def _policy(c: Conversion, objective: str) -> None:
    """Set the group of grpo, rloo or ppo."""
    names = ["beta", "num_generations", "max_new_tokens", "temperature", "num_iterations"]
    group = {name: value for name in [*names, "clip_range"] if (value := c.get(name)) is not None}
    for name in group:
        c.use(name, {objective: group}, shown=(f"{objective}.{name}",))
    if (scale := c.get("scale_rewards")) is not None and objective == "grpo":
        if str(scale).lower() in ("true", "group", "false", "none"):
            group["scale_rewards"] = str(scale).lower() in ("true", "group")
            c.use("scale_rewards", {objective: group}, shown=("grpo.scale_rewards",))
        else:
            c.missing("scale_rewards")
    if c.get("loss_type") in (objective, None):
        c.comment("loss_type")
    c.settings[objective] = group
    _rewards(c, group, objective)


def _rewards(c: Conversion, group: dict[str, Any], objective: str) -> None:
    """Set reward_funcs: functions of a script are to be copied into a file of their own."""
    if model := c.get("reward_model"):
        group["reward_funcs"] = str(model)
        c.use("reward_model", {}, "a run of --objective reward", ("ppo.reward_funcs",))
        return
    given = c.get("reward_funcs", [])
    names = [given] if isinstance(given, str) else list(given)
    found = [_reward(str(name)) for name in names]
    if not found:
        hint = "reward_funcs: FILE.py:FUNCTION, to be added to the settings"
        raise SettingsError("the configuration names no reward function", hint=hint)
    weights = [float(weight) for weight in c.get("reward_weights") or [1.0] * len(found)]
    is_one = len(found) == 1 and weights == [1.0]
    group["reward_funcs"] = found[0] if is_one else dict(zip(found, weights, strict=False))
    is_code = any(name.startswith(REWARDS_FILE) for name in found)
    note = f"copy these functions into {REWARDS_FILE}" if is_code else None
    c.use("reward_funcs", {}, note, (f"{objective}.reward_funcs",))
    if c.get("reward_weights"):
        c.use("reward_weights", {}, shown=(f"{objective}.reward_funcs",))


def _reward(name: str) -> str:
    """Return FILE.py:FUNCTION of a dotted path or of a function in the script."""
    if name.startswith("<"):
        return f"{REWARDS_FILE}:{name.strip('<>')}"
    module, dot, function = name.rpartition(".")
    is_path = "/" in name or ":" in name or name.endswith(".json")
    return name if is_path or not dot else f"{module.replace('.', '/')}.py:{function}"


def _llama_factory(c: Conversion, folder: Path) -> tuple[str, str, bool]:
    llama_factory_data(c, folder)
    stage, loss = str(c.get("stage", "sft")), str(c.get("loss_type", "sigmoid"))
    objective = {"pt": "pretrain", "rm": "reward", "dpo": "dpo"}.get(stage, stage)
    if stage == "dpo" and loss in ("orpo", "simpo"):
        objective = loss
    c.use("stage", {} if objective == "sft" else {"objective": objective})
    kind = str(c.get("finetuning_type", "lora"))
    method = {"lora": "lora", "full": "full", "freeze": "freeze"}.get(kind, "lora")
    if kind in ("lora", "full", "freeze"):
        c.use("finetuning_type", {"method": method})
    else:
        c.missing("finetuning_type")
    if method == "freeze":
        c.use("freeze_trainable_layers", {"layers": f"last:{c.get('freeze_trainable_layers', 2)}"})
    bits = c.get("quantization_bit")
    if bits is not None and int(bits) == 4:
        c.use("quantization_bit", {"method": "qlora"})
    c.settings.pop("objective", None)
    _preferences(c, objective if objective not in ("pretrain",) else "sft")
    if objective == "pretrain":
        c.settings["objective"] = "pretrain"
        c.comment("train_on_inputs", "every token is learned")
    if c.get("template") is not None:
        c.comment("template", "the base's own template is used; --chat-template FILE")
    if (thinking := c.get("enable_thinking")) is not None:
        c.use("enable_thinking", {"template_kwargs": {"enable_thinking": bool(thinking)}})
    tokens = c.get("new_tokens")
    if tokens:
        c.use("new_tokens", {"new_tokens": str(tokens).split(",")})
    if c.get("use_swanlab"):
        c.comment("use_swanlab", "trackers: tensorboard, wandb, mlflow, trackio")
    return objective, method, bits is not None and int(bits) == 4


def _axolotl(c: Conversion) -> tuple[str, str, bool]:
    is_text = axolotl_data(c)
    rl = c.get("rl")
    objective = "reward" if c.get("is_reward_model") else str(rl or "sft")
    if objective == "ipo":
        objective = "dpo"
    if rl:
        c.use("rl", {"objective": objective})
    if c.get("is_reward_model"):
        c.use("is_reward_model", {"objective": "reward"})
        c.comment("num_labels")
    if isinstance(options := c.get("trl"), Mapping):
        _axolotl_policy(c, options, objective)
    else:
        _preferences(c, objective)
    if str(rl) == "ipo":
        c.settings.setdefault("dpo", {})["loss_type"] = "ipo"
    if is_text:
        c.settings["objective"] = objective = "pretrain"
        c.comment("train_on_inputs", "every token is learned")
    if c.get("axolotl_template") is not None:
        c.comment("axolotl_template", "the base's own template is used; --chat-template FILE")
    if tokens := c.get("new_tokens"):
        c.use("new_tokens", {"new_tokens": list(tokens)})
    if c.get("adapter"):
        c.comment("unfrozen_parameters", "an adapter is trained, and the base is frozen")
    if c.get("relora") or c.get("relora_steps"):
        steps = int(c.get("relora_steps", 0))
        for name in ("relora", "relora_steps"):
            c.use(name, {"lora": {"restart_steps": steps}})
    kind = str(c.get("adapter") or "full")
    method = "full" if kind == "full" else "lora"
    if kind in ("lora", "qlora"):
        c.use("adapter", {"method": kind})
    elif c.get("adapter"):
        c.missing("adapter")
    is_4bit = method == "lora" and (kind == "qlora" or bool(c.get("load_in_4bit")))
    if is_4bit:
        c.use("load_in_4bit", {"method": "qlora"})
    return objective, method, is_4bit


def _axolotl_policy(c: Conversion, options: Mapping[str, Any], objective: str) -> None:
    """Read the mapping `trl` of Axolotl: its keys are those of TRL's GRPOConfig."""
    names = {"max_completion_length": "max_new_tokens", "epsilon": "clip_range"}
    same = ("beta", "num_generations", "temperature", "num_iterations", "scale_rewards")
    group: dict[str, Any] = {"beta": 0.0, "max_new_tokens": 512}
    for key, value in options.items():
        if key in (*same, *names):
            group[names.get(key, key)] = value
        elif key.startswith(("use_vllm", "vllm_", "log_", "num_completions")):
            c.part_comment(f"trl.{key}", value, "speed and memory, not the result")
        elif key not in ("reward_funcs", "reward_weights"):
            c.part_missing(f"trl.{key}", value)
    rewards = [_reward(str(name)) for name in options.get("reward_funcs") or []]
    weights = options.get("reward_weights") or [1.0] * len(rewards)
    group["reward_funcs"] = dict(zip(rewards, map(float, weights), strict=False))
    c.use("trl", {"objective": objective, objective: group})


def _mlx(c: Conversion) -> tuple[str, str, bool]:
    mlx_data(c)
    kind = str(c.get("finetuning_type", "lora"))
    c.use("finetuning_type", {"method": kind})
    if (iterations := c.get("iters")) is not None:
        parts = int(c.get("gradient_accumulation_steps", 1))
        c.use("iters", {"max_steps": max(1, int(iterations) // parts)})
    if (layers := int(c.get("num_layers", -1))) > 0:
        c.use("num_layers", {"layers": f"last:{layers}"})
    else:
        c.comment("num_layers")
    _mlx_adapter(c, kind)
    _mlx_schedule(c)
    _mlx_optimizer(c)
    if c.get("mask_prompt"):
        c.comment("mask_prompt", "as always here")
    elif c.has("mask_prompt"):
        c.missing("mask_prompt", "only answers are learned")
    else:
        c.comment("mask_prompt", PROMPTS_NOTE)
    return "sft", kind, False


def _mlx_adapter(c: Conversion, kind: str) -> None:
    """Read lora_parameters: the scale is alpha / rank."""
    given = dict(c.get("lora_parameters") or {})
    if kind == "full":
        c.comment("lora_parameters", NO_EFFECT)
        return
    rank = int(given.pop("rank", 8))
    settings: dict[str, Any] = {"rank": rank, "dropout": float(given.pop("dropout", 0.0))}
    settings["alpha"] = float(given.pop("alpha", float(given.pop("scale", 20.0)) * rank))
    names = [str(name).rpartition(".")[2] for name in given.pop("keys", [])]
    settings["target_modules"] = list(dict.fromkeys(names)) or "all-linear"
    c.use("lora_parameters", settings, "alpha = scale x rank")
    for key, value in given.items():
        c.part_missing(f"lora_parameters.{key}", value)


def _mlx_optimizer(c: Conversion) -> None:
    """Read optimizer_config; AdamW of MLX decays weights by default, and clips no gradients."""
    name = str(c.get("optimizer"))
    given = dict((c.get("optimizer_config") or {}).get(name) or {})
    decay = given.pop("weight_decay", MLX_WEIGHT_DECAY if name == "adamw" else 0.0)
    c.use("optimizer_config", {"weight_decay": float(decay), "max_grad_norm": NO_CLIPPING})
    for key, value in given.items():
        if value in ([0.9, 0.999], 1e-8, False):
            c.part_comment(f"optimizer_config.{key}", value)
        else:
            c.part_missing(f"optimizer_config.{key}", value)


def _mlx_schedule(c: Conversion) -> None:
    """Read lr_schedule: {name, warmup, arguments: [peak, steps, end]}; else the rate stays."""
    given = c.get("lr_schedule")
    if given is None:
        c.settings["lr_scheduler_type"] = "constant"
        c.settings["warmup_ratio"] = 0.0
        return
    names = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    name, arguments = given.get("name"), list(given.get("arguments") or [])
    if name not in names:
        c.missing("lr_schedule", "schedules: cosine_decay, linear_schedule")
        return
    steps = int(c.get("iters", 1000))
    settings: dict[str, Any] = {
        "lr_scheduler_type": names[name],
        "warmup_ratio": round(int(given.get("warmup", 0)) / steps, 4),
    }
    c.use("lr_schedule", settings)
    if arguments:
        c.settings["learning_rate"] = float(arguments[0])
