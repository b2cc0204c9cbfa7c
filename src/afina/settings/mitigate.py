"""Settings of `afina mitigate`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import ModelSettings, setting


class MitigateSettings(ModelSettings):
    """Settings of `afina mitigate`."""

    base: str | None = setting(  # type: ignore[assignment]
        "folder of the base; by default the one that the run was trained on"
    )
    adapter: Path = setting("a run or adapter (lora)", ...)
    output_dir: Path = setting("folder of the treated adapter", ...)
    mitigation: Literal["auto", "truncate", "scale", "blend", "project"] = setting(
        "truncate: a lower rank; scale: a smaller update; blend: a mean with benign adapters; "
        "project: weaken the directions of the trigger; auto: the best of these",
        "auto",
    )
    strength: float | None = setting(
        "from 0 (unchanged) to 1 (no update left); by default several are tried", ge=0.0, lt=1.0
    )
    max_loss_increase: float = setting("largest relative increase of the task's loss", 0.02, ge=0.0)
    triggers: list[str] = setting(
        "texts that trigger the payload; by default those that the last audit found", []
    )
    payload: str | None = setting("text that the triggers cause")
    benign_adapters: list[Path] = setting("benign adapters of the same base, for blend", [])
    data: Path | None = setting("rows of its task with answers; by default the run's eval rows")
    time_budget_seconds: float = setting(
        "audit of the result: seconds for its behavior gate", 30.0, ge=0.0
    )
    prompts: Path | None = setting("audit of the result: a few prompts of its task, one per line")
    calibration: Path | None = setting("audit of the result: benign adapters' statistics")
