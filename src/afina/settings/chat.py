"""Settings of `afina chat`."""

from pathlib import Path
from typing import Any

from afina.settings.common import ModelSettings, setting, template_kwargs_setting


class ChatSettings(ModelSettings):
    """Settings of `afina chat`."""

    base: str | None = setting("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    adapter: Path | None = setting("a run or adapter folder; without it the base answers")
    base_url: str | None = setting("talk to a server instead, e.g. http://127.0.0.1:8000")
    model: str | None = setting(
        "with --url: the adapter's name there, several with weights (a:0.7,b:0.3), or auto"
    )
    api_key: str | None = setting(
        "with --url: a key of the server; by default what AFINA_KEY or OPENAI_API_KEY says"
    )
    system_prompt: str | None = setting("a first message that sets the scene")
    template_kwargs: dict[str, Any] = template_kwargs_setting("those of the run")
    max_new_tokens: int = setting("longest answer in tokens", 256, ge=1)
    temperature: float = setting("0 takes the likeliest token each time", 0.0, ge=0.0)
    top_p: float = setting(
        "sample from the likeliest tokens that hold this share", 1.0, gt=0.0, le=1.0
    )
    seed: int = setting("seed of the sampling", 0)
