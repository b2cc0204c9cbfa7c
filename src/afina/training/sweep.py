"""`afina train sweep.yaml`: many adapters on one base, trained together.

base: embedded                   settings of all runs
data: rows.jsonl
runs:
  - {rank: 4}                    and of each; `name` is that of its folder
  - {method: dora, learning_rate: 1e-3, name: careful}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import SettingsError, TrainingError
from afina.io.atomic import write_json
from afina.settings import TrainSettings, make_settings, read_yaml
from afina.settings.data_files import parse_data
from afina.training.results import SweepResult, TrainResult
from afina.training.setup.processes import world
from afina.training.setup.set_up import free_folder
from afina.training.train import train_many

SUFFIXES = (".yaml", ".yml")


def read_sweep(file: Path, given: Mapping[str, Any]) -> list[TrainSettings]:
    """Return the runs of a sweep file.

    Args:
        file: The sweep file.
        given: Settings that take precedence over those that all runs share, such as flags.

    Raises:
        SettingsError: A run or a setting of it is wrong; the error names both.
    """
    shared = read_yaml(file)
    runs = shared.pop("runs", None)
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        hint = "runs:\n          - {rank: 4}\n          - {rank: 16, learning_rate: 1e-3}"
        raise SettingsError("a sweep lists its runs", where=f"{file}: runs", hint=hint)
    shared |= {name: value for name, value in given.items() if name != "data"}
    out = shared.pop("output_dir", None) or Path("runs") / file.stem
    if "output_dir" not in given and not given.get("overwrite"):
        out = free_folder(Path(out), is_resume=bool(given.get("resume")))
    runs_of_file = []
    for number, own in enumerate(runs, 1):
        values = shared | own
        name = str(values.pop("name", f"{number:02}-{values.get('method', 'lora')}"))
        if "output_dir" in values or Path(name).name != name:
            raise SettingsError(
                "the folder of a run is in that of its sweep",
                where=f"{file}: run {number}",
                hint="name: SOMETHING",
            )
        if "data" not in values:
            raise SettingsError(
                "data is missing",
                where=f"{file}: run {number}",
                hint="data: FILE, for all runs or for each",
            )
        values["data"] = _from_sweep(file, values["data"])
        runs_of_file.append(
            make_settings(
                TrainSettings, values | {"output_dir": out / name}, where=f"{file}: run {number}"
            )
        )
    return runs_of_file


def _from_sweep(file: Path, data: Any) -> Any:
    """Return the files of `data`, relative to the sweep file's folder where they exist there."""
    found = parse_data(data)
    if isinstance(found, Path):
        return _next_to_sweep(file, found)
    return [one.model_copy(update={"path": _next_to_sweep(file, one.path)}) for one in found]


def _next_to_sweep(file: Path, path: Path) -> Path:
    return file.parent / path if not path.exists() and (file.parent / path).exists() else path


def sweep(file: Path, given: Mapping[str, Any], *, quiet: bool = True) -> SweepResult:
    """Run a sweep file; write sweep.json next to the run folders, and return its content."""
    runs = read_sweep(file, given)
    outcomes = train_many(runs, quiet=quiet)
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
    }
    if isinstance(outcome, TrainingError):
        return about | {"failed": str(outcome)}
    record = outcome.record
    names = ("eval_loss_before", "eval_loss_after", "forgetting")
    losses = {name: record["losses"][name] for name in names}
    figures = {
        key: record[key]
        for key in ("learning_rate", "trainable_parameters", "steps", "seconds", "adapter_kb")
    }
    return about | figures | losses | {"verdict": record["verdict"]}
