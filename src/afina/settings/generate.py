"""Settings of `afina generate`."""

from pathlib import Path
from typing import Any

from afina.settings.common import ModelSettings, setting, template_kwargs_setting


class GenerateSettings(ModelSettings):
    """Settings of `afina generate`."""

    base: str | None = setting(  # type: ignore[assignment]
        "the frozen model; by default the one that the run was trained on"
    )
    prompts: list[str] = setting("the prompts; '-' reads one per line from standard input", ...)
    adapter: Path | None = setting("a run or adapter folder; without it the base answers")
    disable_adapter: bool = setting("generate with the base alone, under the adapter", False)
    ignore_chat_template: bool = setting(
        "continue the text itself instead of formatting it as a chat", False
    )
    template_kwargs: dict[str, Any] = template_kwargs_setting("those of the run")
    max_new_tokens: int = setting("longest answer in tokens", 128, ge=1)
    temperature: float = setting(
        "sampling temperature; 0: greedy decoding (the likeliest token each time)", 0.0, ge=0.0
    )
    top_p: float = setting(
        "nucleus sampling: sample from the likeliest tokens with this total probability",
        1.0,
        gt=0.0,
        le=1.0,
    )
    seed: int = setting("seed of the sampling", 0)
