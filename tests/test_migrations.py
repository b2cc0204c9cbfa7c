"""Names of version 0.1: files are translated by the table that the errors of old flags name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from afina.cli.main import run as run_cli
from afina.io import migrations
from afina.settings.renamed import RENAMED_SETTINGS


def test_files_and_flags_follow_the_same_renaming() -> None:
    flags = dict(RENAMED_SETTINGS["TrainSettings"])
    flags.pop("holdout")  # became two settings: a file's value decides which one
    assert flags == migrations.SETTINGS


def test_settings_of_version_1_are_translated_once() -> None:
    old: dict[str, Any] = {"out": "runs/a", "steps": 4, "holdout": "rows.jsonl", "seed": 3}
    new = migrations.migrate_settings(old)
    assert new["output_dir"] == "runs/a" and new["max_steps"] == 4 and new["seed"] == 3
    assert new["eval_data"] == "rows.jsonl" and "holdout" not in new
    assert migrations.migrate_settings(new) == new
    assert migrations.migrate_settings({"holdout": 0.2})["eval_size"] == 0.2


VERSION_1 = Path(__file__).parent / "data" / "v1"  # written by version 0.1 on the embedded base


@pytest.mark.slow
def test_folders_of_version_1_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run, one of preferences, and one that was killed after its first step."""
    shutil.copytree(VERSION_1, tmp_path / "v1")
    monkeypatch.chdir(tmp_path / "v1")
    monkeypatch.setattr("afina.evaluation.retention.NUM_RETENTION_TOKENS", 256)

    def run(*arguments: str) -> dict[str, Any]:
        assert run_cli([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    for name in ("run", "dpo"):  # loading verifies the adapter's hash
        record = json.loads(Path(name, "run.json").read_text())
        # version 0.1 computed in bfloat16
        loss = pytest.approx(record["losses"]["held_after"], abs=0.02)
        assert run("eval", name)["after"]["loss"] == loss
    assert run("show", "run")["method"] == "lora"
    begun = ("--config", "begun/settings.yaml", "--output-dir", "begun")
    run("train", *begun, "--resume")
    lines = Path("begun", "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
