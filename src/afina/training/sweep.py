"""`afina train sweep.yaml`: many adapters on one base, trained together.

base: embedded                   settings that all runs have
data: rows.jsonl
runs:
  - {rank: 4}                    and what each has of its own; `name` is its folder's
  - {method: dora, learning_rate: 1e-3, name: careful}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import SettingsError, TrainingError
from afina.io.atomic import write_json
from afina.settings import TrainSettings, make_settings, read_yaml
from afina.training.results import SweepResult, TrainResult
from afina.training.setup.processes import world
from afina.training.train import Choose, train_many

SUFFIXES = (".yaml", ".yml")


def read_sweep(file: Path, told: Mapping[str, Any]) -> list[TrainSettings]:
    """The runs of a sweep file; `told` are settings from elsewhere, which go before those that all runs have.

    Raises `SettingsError` naming the run and the setting that are wrong.
    """
    shared = read_yaml(file)
    runs = shared.pop("runs", None)
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        hint = "runs:\n          - {rank: 4}\n          - {rank: 16, learning_rate: 1e-3}"
        raise SettingsError("a sweep lists its runs", where=f"{file}: runs", hint=hint)
    shared |= {name: value for name, value in told.items() if name != "data"}
    out = Path(shared.pop("output_dir", None) or Path("runs") / file.stem)
    made = []
    for number, own in enumerate(runs, 1):
        values = shared | own
        name = str(values.pop("name", f"{number:02}-{values.get('method', 'lora')}"))
        if "output_dir" in values or Path(name).name != name:
            raise SettingsError(
                "a run's folder lies in its sweep's",
                where=f"{file}: run {number}",
                hint="name: SOMETHING",
            )
        if "data" not in values:
            raise SettingsError(
                "data is missing",
                where=f"{file}: run {number}",
                hint="data: FILE, for all runs or for each",
            )
        values["data"] = _beside(file, values["data"])
        made.append(
            make_settings(
                TrainSettings, values | {"output_dir": out / name}, where=f"{file}: run {number}"
            )
        )
    return made


def _beside(file: Path, data: Any) -> Path:
    """A path as it is, or from the sweep file's folder where it is not found from here."""
    path = Path(str(data))
    return file.parent / path if not path.exists() and (file.parent / path).exists() else path


def sweep(
    file: Path, told: Mapping[str, Any], *, quiet: bool = True, choose: Choose | None = None
) -> SweepResult:
    """Run a sweep file; write sweep.json next to the run folders, and return its content."""
    runs = read_sweep(file, told)
    outcomes = train_many(runs, quiet=quiet, choose=choose)
    folder = runs[0].output_dir.parent  # type: ignore[union-attr]
    lines = [_line(settings, outcome) for settings, outcome in zip(runs, outcomes, strict=True)]
    result = SweepResult(folder=str(folder), runs=lines)
    if world().is_main_process:
        write_json(folder / "sweep.json", dict(result))
    return result


def _line(settings: TrainSettings, outcome: TrainResult | TrainingError) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": settings.output_dir.name,  # type: ignore[union-attr]
        "method": settings.method,
        "rank": settings.rank,
    }  # type: ignore[union-attr]
    if isinstance(outcome, TrainingError):
        return about | {"failed": str(outcome)}
    record = outcome.record
    losses = {key: record["losses"][key] for key in ("eval_loss_before", "eval_loss_after", "forgetting")}
    figures = {
        key: record[key]
        for key in ("learning_rate", "trainable_parameters", "steps", "seconds", "adapter_kb")
    }
    return about | figures | losses | {"verdict": record["verdict"]}
