"""Experiment trackers, each against its real package, offline; skipped where that is missing."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from afina.cli.main import run as cli
from afina.io.extras import EXTRAS
from afina.settings import TrainSettings, make_settings
from afina.settings.train import TRACKER_NAMES
from afina.training.trackers import TRACKERS, TRACKERS_FILE, tracked

METRICS = [{"loss": 2.0 - n, "rewards/margins": 0.5 * n} for n in range(3)]


def needs(name: str) -> pytest.MarkDecorator:
    reason = f"{name} is not installed (extra {name})"
    return pytest.mark.skipif(find_spec(name) is None, reason=reason)


def log(folder: Path, name: str, steps: range, done: int = 0) -> str:
    """Log some steps of a run through `tracked`; return the run's id in the tracker."""
    settings = make_settings(TrainSettings, {"data": "rows.jsonl", "report_to": [name]})
    trainer: Any = SimpleNamespace(
        world=SimpleNamespace(is_main_process=True),
        setup=SimpleNamespace(settings=settings),
        run=folder,
        progress=SimpleNamespace(step=done),
        trackers=[],
    )
    with tracked([trainer]):
        for step in steps:
            for tracker in trainer.trackers:
                tracker.log(METRICS[step - 1], step)
    return str(json.loads((folder / TRACKERS_FILE).read_text())[name])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (run := tmp_path / "run").mkdir()
    return run


@needs("tensorboard")
def test_tensorboard_has_the_metrics_and_a_resumed_run_replaces_later_steps(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert log(folder, "tensorboard", range(1, 4)) == "tensorboard"
    log(folder, "tensorboard", range(3, 4), done=2)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "rewards/margins"}
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 2.0), (2, 1.0), (3, 0.0)]


@needs("mlflow")
def test_mlflow_has_the_metrics_and_a_resumed_run_goes_on(folder: Path) -> None:
    from mlflow import MlflowClient

    first = log(folder, "mlflow", range(1, 3))
    assert log(folder, "mlflow", range(3, 4), done=2) == first
    found = MlflowClient().get_metric_history(first, "rewards/margins")
    assert [(one.step, one.value) for one in found] == [(1, 0.0), (2, 0.5), (3, 1.0)]
    assert MlflowClient().get_run(first).data.params["method"] == "lora"


@needs("wandb")
def test_wandb_writes_an_offline_run_and_resumes_it(folder: Path) -> None:
    first = log(folder, "wandb", range(1, 3))
    assert log(folder, "wandb", range(3, 4), done=2) == first
    assert [path for path in (folder / "wandb").glob(f"offline-run-*-{first}")]


@needs("trackio")
def test_trackio_has_the_metrics_and_a_resumed_run_goes_on(folder: Path) -> None:
    first = log(folder, "trackio", range(1, 3))
    assert log(folder, "trackio", range(3, 4), done=2) == first


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("wandb,comet", "comet"),
    ],
)
def test_an_unknown_tracker_is_an_error(
    names: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", "nowhere.jsonl", "--report-to", names]) == 2
    shown = capsys.readouterr().err
    assert "report_to" in shown and error.split("'")[-2 if "'" in error else 0] in shown


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_read(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("afina.io.extras.find_spec", lambda module: None)
    assert cli(["train", "nowhere.jsonl", "--report-to", name]) == 2
    assert f"pip install 'afina[{name}]'" in capsys.readouterr().err
    assert set(TRACKERS) == set(TRACKER_NAMES) <= set(EXTRAS)
