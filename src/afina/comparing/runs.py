"""The runs of a comparison: as training runs, several in one pass where that is exact, each resumed where it stood.

A run that fails is written down (failed.json in its folder) and the others go on.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from afina.comparing.rows import Rows
from afina.config import CompareSettings, TrainSettings, make_settings
from afina.delta.contract import method
from afina.delta.presets import preset
from afina.disk import write_json
from afina.errors import AfinaError, TrainingError
from afina.planning.dial import train_many
from afina.training.checkpoint import FOLDER, SETTINGS

TOGETHER = 4  # adapters in one pass: beyond, memory grows and little time is saved
CHECKS = 5  # looks at the rows that choose, in a run
FAILED = "failed.json"


def run_settings(asked: CompareSettings, rows: Rows, name: str, rate: float, steps: int, seed: int, out: Path) -> TrainSettings:
    """One run of `name`, a method or a variant."""
    same = ("base", "revision", "trust_remote_code", "dtype", "device", "template", "general", "max_length", "batch_tokens",
            "skip_bad_rows")  # fmt: skip
    told = {key: getattr(asked, key) for key in same} | asked.told(name) | {
        "data": rows.train, "holdout": rows.choose, "out": out, "objective": rows.objective, "learning_rate": rate,
        "steps": steps, "seed": seed, "check_every": max(1, steps // CHECKS),
    }  # fmt: skip
    return make_settings(TrainSettings, told)


def share_a_pass(name: str, objective: str) -> str | None:
    """A word that adapters have in common which can learn in one pass; None for what trains alone."""
    meant = preset(name, 1)
    return None if objective == "classify" or method(meant.delta).replaces else meant.storage


def finished(folder: Path) -> bool:
    """Whether a run is done: its card is written last."""
    return (folder / "README.md").is_file()


def failure(folder: Path) -> str | None:
    """What stopped a run, if something did."""
    file = folder / FAILED
    return str(json.loads(file.read_text())["why"]) if file.is_file() else None


def train_all(runs: Sequence[TrainSettings]) -> None:
    """Train what is not done yet. Those that share a base go through it together; one that breaks leaves the rest alone."""
    groups: dict[str, list[TrainSettings]] = {}
    for run in runs:
        assert run.out is not None
        if not finished(run.out) and failure(run.out) is None:
            shared = share_a_pass(run.method, run.objective)
            groups.setdefault(shared or str(run.out), []).append(run)
    for group in groups.values():
        for start in range(0, len(group), TOGETHER):
            _train(group[start : start + TOGETHER])


def _train(group: Sequence[TrainSettings]) -> None:
    try:
        outcomes = train_many([_resumed(run) for run in group])
    except (AfinaError, RuntimeError, MemoryError) as error:  # RuntimeError: a device that is out of memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(group) > 1:
            for run in group:
                _train([run])
            return
        outcomes = [error if isinstance(error, TrainingError) else TrainingError(str(error).split("\n  ")[0])]
    for run, outcome in zip(group, outcomes, strict=True):
        assert run.out is not None
        if isinstance(outcome, TrainingError):
            write_json(run.out / FAILED, {"why": outcome.what})
        shutil.rmtree(run.out / FOLDER, ignore_errors=True)  # full: three times the model, for each run


def _resumed(run: TrainSettings) -> TrainSettings:
    """The run as it goes on where it has begun; what was cut off before it began is swept away."""
    assert run.out is not None
    if (run.out / SETTINGS).is_file():
        return run.model_copy(update={"resume": True})
    shutil.rmtree(run.out, ignore_errors=True)
    return run
