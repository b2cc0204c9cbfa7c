"""Settings of `afina chat`."""

from pathlib import Path
from typing import Any

from afina.settings.common import ModelSettings, setting, template_kwargs_setting


class ChatSettings(ModelSettings):
    """Settings of `afina chat`."""

    base: str | None = setting(  # type: ignore[assignment]
        "the frozen model; by default the one that the run was trained on"
    )
    adapter: Path | None = setting("a run or adapter folder; without it the base answers")
    base_url: str | None = setting("use a server instead, e.g. http://127.0.0.1:8000")
    model: str | None = setting(
        "with --base-url: the adapter's name there, several with weights (a:0.7,b:0.3), or auto"
    )
    api_key: str | None = setting(
        "with --base-url: a key of the server; by default the value of AFINA_KEY or OPENAI_API_KEY"
    )
    system_prompt: str | None = setting("the system message of every conversation")
    template_kwargs: dict[str, Any] = template_kwargs_setting("those of the run")
    max_new_tokens: int = setting("longest answer in tokens", 256, ge=1)
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
