"""Settings of `afina mitigate`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import ModelSettings, setting


class MitigateSettings(ModelSettings):
    """Settings of `afina mitigate`."""

    base: str | None = setting("folder of the base; by default the one that the run was trained on")  # type: ignore[assignment]
    adapter: Path = setting("a run or adapter (lora)", ...)
    output_dir: Path = setting("folder of the treated adapter", ...)
    mitigation: Literal["auto", "cut", "scale", "mix", "remove"] = setting(
        "cut: fewer directions; scale: weaker; mix: with benign ones; remove: what the trigger fills; auto: the best of them",
        "auto",
    )
    strength: float | None = setting(
        "0: as it is, 1: nothing left; by default several are tried", ge=0.0, lt=1.0
    )
    max_loss_increase: float = setting("by what share the task's loss may rise", 0.02, ge=0.0)
    triggers: list[str] = setting(
        "texts that wake it; by default those that its last audit has found", []
    )
    payload: str | None = setting("what they make it say")
    benign_adapters: list[Path] = setting("benign adapters of the same base, for mix", [])
    data: Path | None = setting(
        "rows of its task with answers; by default the run's own held-out rows"
    )
    time_budget_seconds: float = setting(
        "audit of the result: seconds for looking at what it does", 30.0, ge=0.0
    )
    prompts: Path | None = setting("audit of the result: a few prompts of its task, one a line")
    calibration: Path | None = setting("audit of the result: benign adapters' statistics")
