"""Settings of `afina extract`."""

from pathlib import Path

from afina.settings.common import ModelSettings, setting


class ExtractSettings(ModelSettings):
    """Settings of `afina extract`."""

    base: str | None = setting(  # type: ignore[assignment]
        "the frozen model; by default the one that the run was trained on"
    )
    adapter: Path | None = setting("a run or adapter of any method")
    finetuned_model: Path | None = setting(
        "instead of an adapter: the folder of a model that was fine-tuned from --base"
    )
    output_dir: Path = setting("folder of the low-rank adapter", ...)
    max_rank: int | None = setting("largest rank of a layer", ge=1)
    retained_energy: float | None = setting(
        "ratio of each module's squared update to retain, e.g. 0.9; it determines the ranks",
        gt=0.0,
        le=1.0,
    )
    data: Path | None = setting(
        "rows to measure the loss on; by default the run's eval rows, or general text"
    )
    columns: dict[str, str | list[str] | None] = setting(
        "names of the columns, e.g. {prompt: question, completion: answer}", {}
    )
