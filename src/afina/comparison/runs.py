"""Training runs of a comparison: several in one pass where that is exact, each resumable.

A run that fails is recorded (failed.json in its folder), and the others continue.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
from afina.comparison.split import ComparisonSplit
from afina.errors import AfinaError, TrainingError
from afina.io.atomic import write_json
from afina.settings import CompareSettings, TrainSettings, make_settings
from afina.settings.common import CHAT_SETTINGS, MODEL_SETTINGS
from afina.training.checkpoint import FOLDER, SETTINGS
from afina.training.train import train_many

TOGETHER = 4  # adapters in one pass: with more, memory grows and little time is saved
CHECKS = 5  # evaluations on the dev rows in a run
FAILED = "failed.json"


def run_settings(
    compared: CompareSettings,
    rows: ComparisonSplit,
    name: str,
    rate: float,
    steps: int,
    seed: int,
    out: Path,
) -> TrainSettings:
    """Return the settings of one run of a method or variant."""
    same = (
        *MODEL_SETTINGS,
        *CHAT_SETTINGS,
        "retention_text",
        "max_length",
        "max_tokens_per_batch",
        "skip_bad_rows",
    )
    run_values = (
        {key: getattr(compared, key) for key in same}
        | compared.settings_for(name)
        | {
            "data": rows.train,
            "eval_data": rows.validation,
            "output_dir": out,
            "objective": rows.objective,
            "learning_rate": rate,
            "max_steps": steps,
            "seed": seed,
            "eval_steps": max(1, steps // CHECKS),
        }
    )
    return make_settings(TrainSettings, run_values)


def pass_group(name: str, objective: str) -> str | None:
    """Return the key of adapters that can share a pass; None for one that trains alone."""
    meant = get_preset(name, 1)
    return (
        None
        if objective == "classify" or get_method(meant.method).replaces_base
        else meant.quantization
    )


def is_finished(folder: Path) -> bool:
    """Return whether a run is complete: its card is written last."""
    return (folder / "README.md").is_file()


def failure_reason(folder: Path) -> str | None:
    """Return the error that ended a run, or None."""
    file = folder / FAILED
    return str(json.loads(file.read_text())["why"]) if file.is_file() else None


def train_all(runs: Sequence[TrainSettings]) -> None:
    """Train the unfinished runs, in shared passes where possible; a failure affects one run."""
    groups: dict[str, list[TrainSettings]] = {}
    for run in runs:
        assert run.output_dir is not None
        if not is_finished(run.output_dir) and failure_reason(run.output_dir) is None:
            shared = pass_group(run.method, run.objective)
            groups.setdefault(shared or str(run.output_dir), []).append(run)
    for group in groups.values():
        for start in range(0, len(group), TOGETHER):
            _train(group[start : start + TOGETHER])


def _train(group: Sequence[TrainSettings]) -> None:
    try:
        outcomes = train_many([_resumed(run) for run in group])
    except (
        AfinaError,
        RuntimeError,
        MemoryError,
    ) as error:  # RuntimeError: a device that is out of memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(group) > 1:
            for run in group:
                _train([run])
            return
        outcomes = [
            error
            if isinstance(error, TrainingError)
            else TrainingError(str(error).split("\n  ")[0])
        ]
    for run, outcome in zip(group, outcomes, strict=True):
        assert run.output_dir is not None
        if isinstance(outcome, TrainingError):
            write_json(run.output_dir / FAILED, {"why": outcome.what})
        shutil.rmtree(
            run.output_dir / FOLDER, ignore_errors=True
        )  # full: three times the model's size, per run


def _resumed(run: TrainSettings) -> TrainSettings:
    """Return the run with `resume` where it has started; delete its folder otherwise."""
    assert run.output_dir is not None
    if (run.output_dir / SETTINGS).is_file():
        return run.model_copy(update={"resume": True})
    shutil.rmtree(run.output_dir, ignore_errors=True)
    return run
