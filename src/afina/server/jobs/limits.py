"""Upper bounds of the settings that a job may have."""

from collections.abc import Mapping
from typing import Any

from afina.server.errors import APIError

# of each number that a job may set, also in the group of a method or objective
JOB_LIMITS: dict[str, float] = {
    "rank": 1024,
    "alpha": 1e5,
    "rank_pattern": 1024,
    "layers": 10_000,
    "max_length": 1 << 17,
    "max_steps": 1_000_000,
    "max_tokens_per_batch": 1 << 17,
    "learning_rate": 1e3,
    "weight_decay": 1e3,
    "max_grad_norm": 1e6,
    "gradient_checkpointing": 10_000,
    "eval_steps": 1_000_000,
    "early_stopping_patience": 1_000_000,
    "sft_weight": 1e3,
    "num_generations": 256,
    "prompts_per_step": 256,
    "max_new_tokens": 1 << 15,
    "temperature": 100.0,
    "num_iterations": 100,
    "beta": 1e3,
    "restart_steps": 1_000_000,
}
MAX_TEXT = 4096  # characters of a text, such as a pattern of modules
MAX_ITEMS = 4096  # of a list or table


def check_job_limits(values: Mapping[str, Any], where: str = "afina") -> None:
    """Raise `APIError` 400 for a setting of a job beyond its bound."""
    for name, value in values.items():
        param = f"{where}.{name}"[:120]
        if isinstance(value, Mapping) and name not in JOB_LIMITS:
            check_job_limits(value, param)
            continue
        for one in _flat(value, param):
            if isinstance(one, str) and len(one) > MAX_TEXT:
                raise APIError(400, f"{param}: a text of more than {MAX_TEXT} characters", param)
            limit = JOB_LIMITS.get(name)
            is_number = isinstance(one, int | float) and not isinstance(one, bool)
            if limit is not None and is_number and not abs(one) <= limit:
                raise APIError(400, f"{param} is {one:g}: it must be at most {limit:g}", param)


def _flat(value: Any, param: str) -> list[Any]:
    """Return the values in a list or table, names of a table included."""
    if not isinstance(value, list | Mapping):
        return [value]
    if len(value) > MAX_ITEMS:
        raise APIError(400, f"{param}: more than {MAX_ITEMS} items", param)
    return [*value, *value.values()] if isinstance(value, Mapping) else list(value)
