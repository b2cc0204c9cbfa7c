"""`afina doctor`: what the machine has, what is missing, and an exit status for scripts."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from afina.cli import doctor as subject
from afina.cli.main import run as cli
from afina.io.extras import EXTRAS
from afina.settings import DoctorSettings, make_settings
from sources import ROOT

NOT_FOR_USERS = {"test", "docs", "fuzz"}


def checks(**settings: Any) -> dict[str, dict[str, Any]]:
    return {
        one["name"]: one
        for one in subject.doctor(make_settings(DoctorSettings, settings))["checks"]
    }


def test_a_good_machine_has_no_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    assert cli(["doctor", "--output-dir", str(tmp_path / "a" / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [one["name"] for one in found["checks"]]
    assert {"CPU", "instructions", "memory", "torch", "kernels", "cache", "runs", "hub"} <= {*names}
    assert not (tmp_path / "a").exists() and not (tmp_path / "cache").exists()
    assert cli(["doctor", "--output-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no problems" in shown and max(map(len, shown.splitlines())) <= 80


def test_every_extra_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - NOT_FOR_USERS


def test_a_missing_extra_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afina.io.extras.find_spec", lambda name: None)
    found = subject.doctor(make_settings(DoctorSettings, {}))["extras"]
    assert all(one["hint"] == f"pip install 'afina[{one['name']}]'" for one in found)
    assert {one["status"] for one in found} == {"optional"}


def test_kernels_that_are_missing_or_wrong_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "skinny_linear", lambda x, weight: torch.zeros(3, 32))
    assert "wrong results" in checks()["kernels"]["value"]
    monkeypatch.setattr(subject.kernels, "library", None)
    assert (
        checks()["kernels"]["status"] == "problem" and "pip install" in checks()["kernels"]["hint"]
    )


def test_a_folder_that_cannot_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli(["doctor", "--output-dir", str(tmp_path / "file" / "runs")]) == 1
    assert "problem: runs: " in capsys.readouterr().out
    monkeypatch.setattr(subject, "MIN_FREE_BYTES", float("inf"))
    assert checks()["cache"]["status"] == "problem"


def test_offline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checks()["hub"]["value"].startswith("offline (HF_HUB_OFFLINE=1")
