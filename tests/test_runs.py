"""`afina runs`: the runs below a folder, sorted and filtered; damaged ones; comparisons."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from afina.cli.main import run as cli
from afina.errors import DataError, TrainingError
from afina.settings import RunsSettings, make_settings
from afina.training.run_folder import record_failure
from afina.training.run_list import RunComparison, find_runs, runs, summarize


def record(**changes: Any) -> dict[str, Any]:
    score = {"name": "exact match", "before": 0.0, "after": 50.0, "unit": "%"}
    values = {
        "format_version": 2,
        "settings": {"method": "lora", "rank": 8, "dpo": {"beta": 0.1}, "output_dir": "x"},
        "base": {"name": "embedded"},
        "method": "lora",
        "objective": "sft",
        "data": {"rows": 1200},
        "steps": 100,
        "seconds": 61.0,
        "peak_memory_mb": 655.0,
        "planned_memory_mb": 700.0,
        "losses": {"eval_loss_before": 4.0, "eval_loss_after": 1.0, "forgetting": 0.05},
        "score": score,
    }
    return values | changes


def write(folder: Path, content: dict[str, Any] | None, steps: int = 3, age: float = 1e4) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step + 1, "loss": 1.0}) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99')
    (folder / "settings.yaml").write_text("method: mora\nbase: tiny\nformat_version: 2\n")
    if content is not None:
        (folder / "run.json").write_text(json.dumps(content))
    os.utime(folder / "metrics.jsonl", (time.time() - age,) * 2)
    return folder


def listed(folder: Path, **settings: Any) -> list[str]:
    result = runs(make_settings(RunsSettings, {"runs": [folder], **settings}))
    return [Path(run["path"]).name for run in result["runs"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    worse = {"name": "exact match", "before": 0.0, "after": 5.0, "unit": "%"}
    write(tmp_path / "a-lora", record())
    write(tmp_path / "deep" / "er" / "b-dora", record(score=worse, method="dora"))
    write(tmp_path / "c-mora", None)
    (tmp_path / "not-a-run").mkdir()
    return tmp_path


def test_runs_are_found_sorted_and_filtered(folder: Path) -> None:
    assert [run.name for run in find_runs(folder)] == ["a-lora", "c-mora", "b-dora"]
    assert listed(folder, sort="name") == ["a-lora", "c-mora", "b-dora"]
    assert listed(folder, sort="score") == ["b-dora", "a-lora", "c-mora"]
    assert listed(folder, sort="score", descending=True) == ["a-lora", "b-dora", "c-mora"]
    assert listed(folder, filter=["mora"]) == ["c-mora"]
    assert listed(folder, filter=["FINISHED", "b-"]) == ["b-dora"]


def test_what_a_run_reached_is_told(folder: Path) -> None:
    found = summarize(folder / "a-lora")
    assert found.results() == {
        "status": "finished",
        "rows": "1,200",
        "steps": "100",
        "score: exact match": "0.0% to 50.0%",
        "eval loss": "4.000 to 1.000",
        "forgetting": "+0.050",
        "time": "61.0 s",
        "memory": "655 (700)",
    }
    reward = {"before": {"reward": 0.1}, "after": {"reward": 0.6}}
    policy = record(score=None, policy=reward, losses={"eval_loss_after": -0.6})
    told = summarize(write(folder / "p", policy)).results()
    assert told["score: mean reward"] == "0.100 to 0.600" and told["eval loss"] == "0.600"


def test_runs_that_did_not_finish_say_how_far_they_came(folder: Path) -> None:
    assert summarize(folder / "c-mora").state == "interrupted at step 3"
    assert summarize(write(folder / "d", None, age=0)).state == "running at step 3"
    error = TrainingError("the loss is not finite at step 4")
    record_failure(write(folder / "e", None), error)
    assert summarize(folder / "e").state == "failed at step 3: the loss is not finite at step 4"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '"a"', "{}", '{"format_version": 99}', '{"settings": 3}', "\0", '{"a": NaN}']
    + [
        json.dumps(record(**{key: value}))
        for key in ("base", "losses", "data", "score")
        for value in (1, "a", [2])
    ]
    + [
        json.dumps({k: v for k, v in record().items() if k != key})
        for key in ("base", "steps", "method")
    ],
)
def test_a_damaged_run_is_listed_with_its_reason(
    folder: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a-lora" / "run.json").write_text(content)
    assert cli(["runs", str(folder), "--sort", "name"]) == 0
    shown = capsys.readouterr().out
    assert "a-lora: damaged: " in shown or "interrupted" in shown.replace("c-mora", "")
    assert "dora" in shown and "Traceback" not in shown


def test_two_runs_are_compared_by_what_differs(folder: Path) -> None:
    other = record()
    other["settings"] |= {"rank": 16, "dpo": {"beta": 0.5}, "output_dir": "y"}
    names = [folder / "a-lora", write(folder / "z", other)]
    found = runs(make_settings(RunsSettings, {"runs": names}))
    assert isinstance(found, RunComparison)
    assert found.settings == {"rank": [8, 16], "dpo.beta": [0.1, 0.5]}
    assert found.results["eval loss"] == ["4.000 to 1.000"] * 2


def test_the_list_fits_in_80_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "a-very-long-name-of-a-run-with-many-parts-lora-12", record())
    assert cli(["runs", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown and "┃" in shown and "1,200," in shown
    assert "c-mora: interrupted at step 3" in shown


def test_a_folder_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs(make_settings(RunsSettings, {}))["runs"] == []
    with pytest.raises(DataError, match="no such folder"):
        runs(make_settings(RunsSettings, {"runs": ["nowhere"]}))
