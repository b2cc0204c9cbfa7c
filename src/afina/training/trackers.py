"""Experiment trackers: metrics of each step go to TensorBoard, W&B, MLflow or trackio.

Metrics have the names of metrics.jsonl. RUN/trackers.json holds the id of the run in each tracker,
so that a resumed run continues there. W&B and MLflow are offline where their own variables set it
(WANDB_MODE=offline; without MLFLOW_TRACKING_URI, MLflow writes below the current folder).
"""

import hashlib
import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

from afina.errors import SettingsError
from afina.io.atomic import write_json
from afina.io.extras import EXTRAS
from afina.io.strict_json import read_json_object
from afina.settings import resolved
from afina.training.trainer import Trainer

TRACKERS_FILE = "trackers.json"
PROJECT = "afina"  # where the tracker's own variable names none


class Tracker(ABC):
    """One run in one tracker.

    Args:
        folder: The run folder.
        settings: Settings of the run.
        run_id: Id of the run in the tracker, where it is resumed.
        step: Step from which it continues.
    """

    name: ClassVar[str]
    run_id: str

    @abstractmethod
    def __init__(
        self, folder: Path, settings: Mapping[str, Any], run_id: str | None, step: int
    ) -> None: ...

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the metrics of an optimizer step."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker(Tracker):
    """TensorBoard: event files in RUN/tensorboard."""

    name = "tensorboard"

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], run_id: str | None, step: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = run_id or self.name
        purged = None if run_id is None else step + 1  # later steps of an interrupted run
        self._writer: Any = SummaryWriter(str(folder / self.run_id), purge_step=purged)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one scalar a metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the event file."""
        self._writer.close()


class WandbTracker(Tracker):
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE and the others are its own variables."""

    name = "wandb"

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], run_id: str | None, step: int
    ) -> None:
        wandb = importlib.import_module("wandb")
        self.run_id = run_id or _new_id(folder)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run_id,
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            resume="allow",
            reinit="create_new",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics at their step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflowTracker(Tracker):
    """MLflow: a run of the experiment `afina`, or of MLFLOW_EXPERIMENT_NAME."""

    name = "mlflow"

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], run_id: str | None, step: int
    ) -> None:
        mlflow = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            run_id = str(self._client.create_run(experiment, run_name=folder.name).info.run_id)
            for key, value in settings.items():
                self._client.log_param(run_id, key, value)
        else:
            self._client.update_run(run_id, "RUNNING")
        self.run_id = run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one metric after the other at its step."""
        for name, value in values.items():
            self._client.log_metric(self.run_id, name, value, step=step)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.run_id)


class TrackioTracker(Tracker):
    """trackio: a run of the project `afina`, in its local database."""

    name = "trackio"

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], run_id: str | None, step: int
    ) -> None:
        trackio = importlib.import_module("trackio")
        self.run_id = run_id or f"{folder.name}-{_new_id(folder)}"
        self._run = trackio.init(
            project=PROJECT, name=self.run_id, config=dict(settings), resume="allow", embed=False
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics at their step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    kind.name: kind for kind in (TensorBoardTracker, WandbTracker, MLflowTracker, TrackioTracker)
}


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed; raises `SettingsError` with what to type."""
    for name in names:
        if missing := EXTRAS[name].missing:
            hint = f"pip install 'afina[{name}]'"
            raise SettingsError(f"{missing[0]} is not installed", where="report_to", hint=hint)


@contextmanager
def tracked(trainers: Sequence[Trainer]) -> Iterator[None]:
    """Send the metrics of trainers to the trackers of their settings, on the main process."""
    try:
        with redirect_stdout(sys.stderr):  # what trackers print is no result
            for trainer in trainers:
                if trainer.world.is_main_process and trainer.setup.settings.report_to:
                    _open(trainer)
        yield
    finally:
        with redirect_stdout(sys.stderr):
            for trainer in trainers:
                for tracker in trainer.trackers:
                    tracker.close()


def _open(trainer: Trainer) -> None:
    file = trainer.run / TRACKERS_FILE
    known = read_json_object(file) if file.is_file() and trainer.progress.step else {}
    settings = resolved(trainer.setup.settings)
    for name in trainer.setup.settings.report_to:
        tracker = TRACKERS[name](trainer.run, settings, known.get(name), trainer.progress.step)
        trainer.trackers.append(tracker)
        known[name] = tracker.run_id
    write_json(file, known)


def _new_id(folder: Path) -> str:
    return hashlib.sha256(str(folder.absolute()).encode() + os.urandom(8)).hexdigest()[:12]
