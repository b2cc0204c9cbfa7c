"""Settings of `afina annotate`."""

from pathlib import Path
from typing import Any

from afina.settings.common import ModelSettings, setting, template_kwargs_setting


class AnnotateSettings(ModelSettings):
    """Settings of `afina annotate`."""

    base: str | None = setting(
        "the frozen model; by default the one that the adapter was trained on"
    )  # type: ignore[assignment]
    prompts: Path = setting(
        "a file of prompts: one a line, or JSONL with a prompt or messages", ...
    )
    adapter: Path | None = setting(
        "a run or adapter whose answers are judged; without it the base's"
    )
    against: str = setting(
        "whose the other answer is: base, same (a second sample), or another run or adapter", "base"
    )
    output_dir: Path | None = setting("folder of the judgements; by default preferences/PROMPTS")
    template_kwargs: dict[str, Any] = template_kwargs_setting("those of the run")
    max_new_tokens: int = setting("longest answer in tokens", 128, ge=1)
    temperature: float = setting("0 takes the likeliest token each time", 0.7, ge=0.0)
    top_p: float = setting(
        "sample from the likeliest tokens that hold this share", 1.0, gt=0.0, le=1.0
    )
    seed: int = setting("seed of the sampling, and of which answer is shown first", 0)
