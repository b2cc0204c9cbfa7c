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


def migrate_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings under the names of today; those of version 2 come back unchanged."""
    new = {SETTINGS.get(name, name): value for name, value in values.items()}
    if "holdout" in new:
        holdout = new.pop("holdout")
        is_ratio = isinstance(holdout, int | float) or str(holdout).replace(".", "", 1).isdigit()
        new |= {"eval_size": float(holdout)} if is_ratio else {"eval_data": str(holdout)}
    if new.get("device") == "sharded":
        new |= {"device": "auto", "fsdp": True}
    if new.get("optimizer") in OPTIMIZERS:
        new["optimizer"] = OPTIMIZERS[new["optimizer"]]
    return new
