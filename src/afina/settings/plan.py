"""Settings of `afina plan`."""

from pathlib import Path

from afina.settings.common import setting
from afina.settings.data_files import DataFiles
from afina.settings.train import TrainSettings


class PlanSettings(TrainSettings):
    """Settings of `afina plan`: those of `afina train`, and what is estimated."""

    data: Path | DataFiles | None = setting(  # type: ignore[assignment]
        "as for train; without it, memory and time of full batches only"
    )
    compare_methods: bool = setting(
        "all methods in one table: memory, time, trainable parameters, size of the file", False
    )
    show: int | None = setting(
        "training examples to print as the model reads them, spread over the rows", ge=1
    )
    show_longest: bool = setting(
        "print the longest training examples, as many as --show or 3", False
    )
    memory_gb: float | None = setting("GB of memory to plan for; by default this machine's", gt=0)
    remeasure: bool = setting(
        "measure this machine again: a few seconds, stored for later plans", False
    )
