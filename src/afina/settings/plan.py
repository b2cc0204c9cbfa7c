"""Settings of `afina plan`."""

from pathlib import Path

from afina.settings.common import setting
from afina.settings.train import TrainSettings


class PlanSettings(TrainSettings):
    """Everything `afina plan` can be told: a training run's settings, and what is asked about it."""

    data: Path | None = setting("as for train; without it, memory and time of full batches alone")  # type: ignore[assignment]
    compare_methods: bool = setting(
        "all methods in one table: memory, time, numbers to learn, size of the file", False
    )
    remeasure: bool = setting(
        "measure this machine anew: a few seconds, kept for later plans", False
    )
