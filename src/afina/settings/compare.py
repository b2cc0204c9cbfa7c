"""Settings of `afina compare`."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from afina.settings.common import (
    ModelSettings,
    allow_control_tokens_setting,
    setting,
    template_kwargs_setting,
)
from afina.settings.train import TrainSettings

VARIED = (
    "method",
    "rank",
    "alpha",
    "scaling",
    "dropout",
    "target_modules",
    "layers",
    "rank_pattern",
    "parameter_budget",
)  # of a variant's own, besides the group of its method


class CompareSettings(ModelSettings):
    """Settings of `afina compare`."""

    data: Path = setting("a file of rows, as for train: answers, plain text, or labels", ...)
    output_dir: Path | None = setting(
        "folder of the comparison, resumed when run again; by default runs/compare-DATA"
    )
    methods: list[str] = setting(
        "the methods to compare", ["full", "freeze", "lora", "qlora", "mora", "dora"]
    )
    variants: dict[str, dict[str, Any]] = setting(
        "methods with settings of their own, under a name that methods may list: "
        "{attention: {method: lora, target_modules: [q_proj, v_proj], rank: 16}}",
        {},
    )
    num_seeds: int = setting("runs of each method, each with another seed", 3, ge=1)
    time_budget: str = setting(
        "longest time: 90s, 30m, 2h; trials, steps or seeds are reduced to keep it, and reported",
        "30m",
    )
    num_trials: int = setting(
        "learning rates to try for each method; the better half continues with twice the steps",
        4,
        ge=1,
    )
    lr_search_range: list[float] = setting(
        "first and last learning rate that are tried, as factors of the method's default: small "
        "models need far larger ones",
        [0.35, 35.0],
    )
    max_steps: int | None = setting(
        "optimizer steps of a run; by default three times over the data", ge=1
    )
    rank: int = setting("rank of the adapters", 8, ge=1)
    metric: Literal["auto", "exact_match", "accuracy", "chrf", "rouge", "loss"] = setting(
        "metric that decides; auto: exact_match for short answers, chrf for long ones, accuracy "
        "for labels, loss for plain text",
        "auto",
    )
    test_size: float = setting(
        "ratio of test rows; half as many (dev rows) choose learning rates and checkpoints",
        0.2,
        gt=0.0,
        lt=0.6,
    )
    limit: int = setting("most rows for which an answer is generated", 100, ge=2)
    max_new_tokens: int = setting("longest answer in tokens", 64, ge=1)
    objective: Literal["auto", "sft", "pretrain", "classify"] = setting("as for train", "auto")
    columns: dict[str, str | list[str] | None] = setting(
        "names of the columns, e.g. {prompt: question, completion: answer}", {}
    )
    skip_bad_rows: bool = setting(
        "leave out rows that cannot be used, and list them in the report", False
    )
    chat_template: str | None = setting(
        "chat template: the tokenizer's own by default, 'plain', 'chatml' or a file"
    )
    template_kwargs: dict[str, Any] = template_kwargs_setting()
    allow_control_tokens: bool = allow_control_tokens_setting()
    retention_text: Path | None = setting(
        "general text of the retention loss; by default the built-in one"
    )
    max_length: int | None = setting(
        "longest sequence in tokens; by default the base's limit, up to 2,048"
    )
    max_tokens_per_batch: int = setting("tokens of one micro-batch", 2048, ge=1)
    seed: int = setting("seed of the split; runs count up from it", 0)
    lang: Literal["en", "es"] = setting("language of the report", "en")

    @field_validator("methods", mode="before")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        """Raise where a method is listed twice: both would share a row of the report."""
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if isinstance(names, list) and (not names or len(set(names)) < len(names)):
            raise ValueError("at least one method, each once")
        return names

    @field_validator("lr_search_range")
    @classmethod
    def _rises(cls, value: list[float]) -> list[float]:
        """Raise where the value is no range."""
        if len(value) != 2 or not 0.0 < value[0] < value[1]:
            raise ValueError("two numbers above 0, the smaller one first: 0.35,35")
        return value

    @field_validator("variants")
    @classmethod
    def _of_methods(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Raise where a variant has no method, or sets what is equal for all methods."""
        for name, settings in value.items():
            if "method" not in settings:
                raise ValueError(f"{name} needs a method: {{{name}: {{method: lora, rank: 16}}}}")
            allowed = (*VARIED, *TrainSettings.group_names())
            if other := next((key for key in settings if key not in allowed), None):
                raise ValueError(f"{name} cannot have {other} of its own, only {', '.join(VARIED)}")
        return value

    def settings_for(self, name: str) -> dict[str, Any]:
        """Return the settings of a method or variant besides those of all methods."""
        return {"rank": self.rank} | self.variants.get(name, {"method": name})

    @field_validator("time_budget")
    @classmethod
    def _is_time(cls, value: str) -> str:
        """Raise where the value is no time."""
        if not re.fullmatch(r"\d+(\.\d+)?\s*[smh]", value.strip()):
            raise ValueError("a number and s, m or h: 90s, 30m, 2h")
        return value.strip()

    @property
    def seconds(self) -> float:
        """The budget in seconds."""
        return float(self.time_budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.time_budget[-1]]
