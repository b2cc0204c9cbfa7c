"""Settings of `afina annotate`."""

from pathlib import Path
from typing import Any

from afina.settings.common import ModelSettings, setting, template_kwargs_setting


class AnnotateSettings(ModelSettings):
    """Settings of `afina annotate`."""

    base: str | None = setting(  # type: ignore[assignment]
        "the frozen model; by default the one that the adapter was trained on"
    )
    prompts: Path = setting(
        "a file of prompts: one per line, or JSONL with a prompt or messages", ...
    )
    adapter: Path | None = setting(
        "a run or adapter whose answers are compared; without it the base's"
    )
    against: str = setting(
        "source of the other answer: base, same (a second sample), or another run or adapter",
        "base",
    )
    output_dir: Path | None = setting("folder of the judgements; by default preferences/PROMPTS")
    template_kwargs: dict[str, Any] = template_kwargs_setting("those of the run")
    max_new_tokens: int = setting("longest answer in tokens", 128, ge=1)
    temperature: float = setting(
        "sampling temperature; 0: greedy decoding (the likeliest token each time)", 0.7, ge=0.0
    )
    top_p: float = setting(
        "nucleus sampling: sample from the likeliest tokens with this total probability",
        1.0,
        gt=0.0,
        le=1.0,
    )
    seed: int = setting("seed of the sampling, and of which answer is shown first", 0)
