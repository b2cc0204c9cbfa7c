"""Settings of `afina eval`."""

from pathlib import Path
from typing import Any

from afina.settings.common import ModelSettings, setting, template_kwargs_setting


class EvalSettings(ModelSettings):
    """Settings of `afina eval`."""

    base: str | None = setting(  # type: ignore[assignment]
        "the frozen model; by default the one that the run was trained on"
    )
    adapter: Path | None = setting("a run or adapter folder; without it the base is evaluated")
    data: Path | None = setting("rows to evaluate on; by default the run's eval rows")
    columns: dict[str, str | list[str] | None] = setting(
        "names of the columns, e.g. {prompt: question, completion: answer}", {}
    )
    metrics: list[str] = setting(
        "exact_match, accuracy, chrf, bleu, rouge", ["exact_match", "chrf"]
    )
    limit: int = setting("most rows for which an answer is generated", 200, ge=1)
    template_kwargs: dict[str, Any] = template_kwargs_setting("those of the run")
    max_new_tokens: int = setting("longest answer in tokens", 128, ge=1)
