"""A package outside afina adds a method, its settings, an objective and a merge method.

Installed into a temporary folder by its entry points alone: no file of afina names it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ENVIRONMENT

ROOT = Path(__file__).parent
SOURCE = ROOT.parent / "src"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plug-in installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "plugin" / "afina_vera", site / "afina_vera")
    info = site / "afina_vera-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: afina-vera\nVersion: 0.1\n")
    shutil.copy(ROOT / "plugin" / "entry_points.txt", info / "entry_points.txt")
    path = os.pathsep.join([str(site), str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return {**ENVIRONMENT, "PYTHONPATH": path, "AFINA_AUDITS": str(site / "audits")}


def run(installed: dict[str, str], *arguments: object, module: str = "afina") -> dict[str, Any]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 3), f"{command}\n{done.stdout}\n{done.stderr}"
    lines = done.stdout.strip().splitlines()
    return dict(json.loads(lines[-1])) if "--json" in arguments else {"text": done.stdout}


def test_formats_file_of_the_plugin_is_generated(
    installed: dict[str, str], tmp_path: Path
) -> None:
    run(installed, "vera", tmp_path / "formats.json", module="afina.adapters.formats")
    stored = (ROOT / "plugin" / "afina_vera" / "formats.json").read_text()
    assert (tmp_path / "formats.json").read_text() == stored


def test_help_names_the_settings_of_the_plugin(installed: dict[str, str]) -> None:
    assert "--vera.seed" in run(installed, "train", "--help")["text"]
    assert "mean" in run(installed, "combine", "--help")["text"]


PLAN = """
import sys
from helpers import RATES
from afina.planning import estimate
estimate.measured_rates = lambda device, anew=False: RATES
import afina
plan = afina.plan(sys.argv[1], base=sys.argv[2], method="vera", rank=4, vera={"seed": 7})
print(plan["cost"]["trainable"] if "trainable" in plan["cost"] else plan["cost"])
"""


@pytest.mark.slow
def test_method_of_the_plugin_is_planned(
    installed: dict[str, str], tiny: Path, chats: Path
) -> None:
    environment = installed | {"PYTHONPATH": f"{ROOT}{os.pathsep}{installed['PYTHONPATH']}"}
    command = [sys.executable, "-c", PLAN, str(chats), str(tiny)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_unknown_method_lists_the_plugin(installed: dict[str, str], chats: Path) -> None:
    command = [sys.executable, "-m", "afina", "plan", str(chats), "--method", "verra"]
    done = subprocess.run(command, env=installed, capture_output=True, text=True)
    assert done.returncode == 2 and "vera" in done.stderr


@pytest.mark.slow
def test_method_of_the_plugin_goes_through_every_command(
    installed: dict[str, str], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    shared = ("--base", tiny, "--method", "vera", "--rank", 4, "--vera.seed", 7, "--json")
    train = ("train", chats, *shared, "--max-steps", 8, "--learning-rate", 0.05)
    train += ("--gradient-checkpointing", "off")
    first = run(installed, *train, "--output-dir", tmp_path / "one")
    assert first["losses"]["eval_loss_after"] < first["losses"]["eval_loss_before"]
    again = run(installed, *train, "--output-dir", tmp_path / "two", "--seed", 1)
    assert again["adapter"] != first["adapter"]

    evaluated = run(installed, "eval", tmp_path / "one", "--json")
    assert evaluated["after"]["loss"] == pytest.approx(first["losses"]["eval_loss_after"], 1e-4)
    assert run(installed, "show", tmp_path / "one", "--json")["method"] == "vera"

    both = (tmp_path / "one", tmp_path / "two")
    merged = run(installed, "merge", both[0], "--output-dir", tmp_path / "merged", "--json")
    assert merged["kl"] < 1e-4
    combine = ("combine", *both, "--merge-method", "mean", "--rank", 8)
    run(installed, *combine, "--output-dir", tmp_path / "mean", "--json")
    summed = ("combine", *both, "--output-dir", tmp_path / "sum", "--json")
    assert run(installed, *summed)["kind"] == "composition"

    audit = run(installed, "audit", tmp_path / "one", "--json")
    assert not [f for f in audit["findings"] if f["gate"] == "files" and f["level"] == "block"]


@pytest.mark.slow
def test_objective_of_the_plugin_trains(
    installed: dict[str, str], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    assert "halved" in run(installed, "train", "--help")["text"]
    shared = ("--base", tiny, "--max-steps", 2, "--gradient-checkpointing", "off", "--json")
    first = []
    for name in ("sft", "halved"):
        command = ("train", chats, "--objective", name, *shared, "--output-dir", tmp_path / name)
        run(installed, *command)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        first.append(json.loads(lines[0])["loss"])
    assert first[1] == pytest.approx(0.5 * first[0], rel=1e-5)
    assert run(installed, "eval", tmp_path / "halved", "--json")["after"]
