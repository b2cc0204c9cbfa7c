"""Common names of other trainers' keys to settings of `afina train`: adapter, batch, schedule."""

import re
from typing import Any

from afina.importing.conversion import NO_EFFECT, Conversion
from afina.settings import POLICIES

SAME = (  # common names that are settings with the same meaning
    "base",
    "revision",
    "trust_remote_code",
    "init_adapter",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "early_stopping_patience",
    "output_dir",
    "seed",
    "template_kwargs",
)
OF_LORA = ("rank", "alpha", "dropout", "use_rslora", "use_dora", "rank_pattern")
OPTIMIZERS = {
    "adam": "adamw",  # without weight decay the two are one
    "adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_hf": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_fused": "adamw",
    "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_8bit": "adamw_8bit",
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "cosine_decay": "cosine",
    "linear": "linear",
    "linear_schedule": "linear",
}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "auto": "auto"}
ROWS_NOTE = "rows of a batch are counted in tokens: batch size x longest sequence"
ALL = "all-linear"
PATTERN = re.compile(r"[\[\](){}|*+^$\\]")  # letters of a regular expression


def combine(conversion: Conversion, objective: str, method: str, is_4bit: bool) -> None:
    """Turn the common names into settings.

    Args:
        conversion: The keys.
        objective: The objective.
        method: lora, dora, full or freeze.
        is_4bit: Whether the base is loaded in 4 bits.
    """
    for name in SAME:
        if name in conversion.settings:
            conversion.use(name, {})
        elif (value := conversion.get(name)) not in (None, "", {}):
            conversion.use(name, {name: value})
    _adapter(conversion, method, is_4bit)
    _precision(conversion)
    _length(conversion)
    _batch(conversion, objective)
    _schedule(conversion)
    _checks(conversion)
    _trackers(conversion)


def _adapter(c: Conversion, method: str, is_4bit: bool) -> None:
    """Choose the method, its rank and its modules."""
    method = "dora" if method == "lora" and c.get("use_dora") else method
    c.settings["method"] = ("q" if is_4bit else "") + method
    if method not in ("lora", "dora"):
        for name in (*OF_LORA, "target_modules"):
            c.comment(name, NO_EFFECT)
        if method == "full":
            c.settings["target_modules"] = "all"
        return
    for name in ("rank", "alpha", "dropout", "rank_pattern"):
        if (value := c.get(name)) not in (None, {}):
            c.use(name, {name: value})
    for name, settings in (
        ("use_rslora", {"scaling": "rslora"}),
        ("use_dora", {"method": c.settings["method"]}),
    ):
        if c.get(name):
            c.use(name, settings)
    if (layers := c.get("layers")) is not None:
        c.use("layers", {"layers": layers})
    modules = c.get("target_modules")
    if c.get("lora_target_linear"):
        c.use("lora_target_linear", {"target_modules": ALL})
        c.comment("target_modules", "they are among all linear modules")
    elif modules is None:
        c.settings.setdefault("target_modules", ["q_proj", "v_proj"])  # PEFT's choice for most
    else:
        c.use("target_modules", {"target_modules": _modules(modules)})


def _modules(value: Any) -> Any:
    """Return names of modules; `all` of some tools is all-linear, of a path its last part."""
    is_list = isinstance(value, str) and "," in value and not PATTERN.search(value)
    names = value.split(",") if is_list else value
    if isinstance(names, list):
        return list(dict.fromkeys(str(name).strip().rpartition(".")[2] for name in names))
    return ALL if names in ("all", "linear", "auto") else names


def _precision(c: Conversion) -> None:
    dtype = str(c.get("dtype", "auto")).removeprefix("torch.")
    if dtype in DTYPES:
        c.use("dtype", {} if dtype == "auto" else {"dtype": DTYPES[dtype]})
    else:
        c.comment("dtype", "precision follows dtype of afina: auto")
    level = c.get("gradient_checkpointing")
    if level is not None:
        c.use("gradient_checkpointing", {"gradient_checkpointing": "all" if level else "off"})


def _length(c: Conversion) -> None:
    """Set steps and epochs; -1 of transformers is none."""
    steps, epochs = c.get("max_steps"), c.get("num_train_epochs")
    if steps is not None and float(steps) > 0:
        c.use("max_steps", {"max_steps": int(steps)})
        c.comment("num_train_epochs", "max_steps takes precedence")
    else:
        c.comment("max_steps")
        if epochs is not None:
            c.use("num_train_epochs", {"num_train_epochs": float(epochs)})


def _batch(c: Conversion, objective: str) -> None:
    """Set the micro-batch in tokens from its rows; of a policy the prompts of a step."""
    rows, length, parts = (
        c.get(name) for name in ("batch_size", "max_length", "gradient_accumulation_steps")
    )
    if objective in POLICIES:
        per_step = int(rows or 1) * int(parts or 1) // int(c.get("num_generations", 8))
        group = c.settings.setdefault(objective, {})
        group["prompts_per_step"] = max(1, per_step)
        for name in ("batch_size", "gradient_accumulation_steps"):
            c.use(
                name, {}, "answers of a step / num_generations", (f"{objective}.prompts_per_step",)
            )
        if c.has("max_length"):
            c.use("max_length", {"max_length": int(length)})
        return
    if length is not None:
        c.use("max_length", {"max_length": int(length)})
        _long_rows(c, objective)
    if rows is not None and length is not None:
        c.use("batch_size", {"max_tokens_per_batch": int(rows) * int(length)}, ROWS_NOTE)
    if parts is not None:
        c.use("gradient_accumulation_steps", {"gradient_accumulation_steps": int(parts)})
    if c.has("packing"):
        c.comment("packing", "rows are always packed; none reads another")


def _long_rows(c: Conversion, objective: str) -> None:
    """Set what happens to rows that are too long: texts become chunks, other rows are cut."""
    if objective == "pretrain" or c.has("text_column"):
        c.comment("long_rows", "texts become chunks of max_length tokens")
    elif c.get("long_rows") == "drop":
        c.use("long_rows", {"skip_bad_rows": True}, "longer rows are left out and listed")
    elif c.get("long_rows") in (None, "truncate"):
        c.settings["truncate"] = True
        c.use("long_rows", {"truncate": True})


def _schedule(c: Conversion) -> None:
    """Set optimizer, schedule and warmup."""
    optimizer = c.get("optimizer")
    if optimizer is not None:
        if str(optimizer) in OPTIMIZERS:
            c.use("optimizer", {"optimizer": OPTIMIZERS[str(optimizer)]})
        else:
            c.missing("optimizer")
    schedule = c.get("lr_scheduler_type")
    if schedule is not None:
        if schedule in SCHEDULES:
            c.use("lr_scheduler_type", {"lr_scheduler_type": SCHEDULES[schedule]})
        else:
            c.missing("lr_scheduler_type")
    ratio, steps = c.get("warmup_ratio"), c.get("warmup_steps")
    if c.has("warmup_steps") and not c.has("warmup_ratio"):
        ratio = None
    total = c.settings.get("max_steps")
    if ratio is not None:
        c.use("warmup_ratio", {"warmup_ratio": float(ratio)})
        c.comment("warmup_steps", "warmup_ratio is given")
    elif steps is not None and float(steps) < 1:
        c.use("warmup_steps", {"warmup_ratio": round(float(steps), 4)})
    elif steps is not None and total:
        share = min(1.0, float(steps) / total)
        c.use("warmup_steps", {"warmup_ratio": round(share, 4)})
    elif steps is not None:
        c.comment("warmup_steps", "a number of steps is a ratio only with max_steps; 0.05 is used")


def _checks(c: Conversion) -> None:
    """Set what is held out, and how often it is evaluated."""
    size, steps = c.get("eval_size"), c.get("eval_steps")
    if size is not None and 0 < float(size) < 1:
        c.use("eval_size", {"eval_size": float(size)})
    elif size is not None:
        c.comment("eval_size", "a ratio of the rows is always held out: eval_size, 0.1")
    is_off = str(c.get("eval_strategy", "steps")) in ("no", "False", "epoch")
    if steps is not None and float(steps) >= 1 and not is_off:
        c.use("eval_steps", {"eval_steps": int(steps)})
    for name in ("eval_strategy", "eval_steps"):
        if not is_off and name == "eval_steps" and "eval_steps" in c.settings:
            continue
        c.comment(name, "a check follows each tenth of the run, or eval_steps")


def _trackers(c: Conversion) -> None:
    """Set the experiment trackers that both have."""
    given = c.get("report_to", [])
    names = [given] if isinstance(given, str) else list(given)
    chosen = {name: "report_to" for name in names if name in TRACKERS}
    for name, key in (
        ("wandb", "use_wandb"),
        ("wandb", "wandb_project"),
        ("mlflow", "use_mlflow"),
        ("mlflow", "mlflow_experiment_name"),
    ):
        if c.get(key):
            chosen[name] = key
    for name in ("report_to", "use_wandb", "wandb_project", "use_mlflow", "mlflow_experiment_name"):
        if name in chosen.values():
            c.use(name, {"report_to": list(chosen)})
        else:
            c.comment(name, "trackers: " + ", ".join(TRACKERS))
