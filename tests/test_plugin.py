"""A package outside afina adds a method, its settings, an objective and a merge method.

Installed into a temporary folder by its entry points alone: no file of afina names it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import ENVIRONMENT

ROOT = Path(__file__).parent
SOURCE = ROOT.parent / "src"
# command lines from standard input, one JSON list each; [status, output, errors] of each comes back
SESSION = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from afina.cli.main import run
from afina.planning import machine
from helpers import RATES
machine.measured_rates = lambda device, anew=False: RATES
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = run(json.loads(line))
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plug-in installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "plugin" / "afina_vera", site / "afina_vera")
    info = site / "afina_vera-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: afina-vera\nVersion: 0.1\n")
    shutil.copy(ROOT / "plugin" / "entry_points.txt", info / "entry_points.txt")
    path = os.pathsep.join([str(site), str(SOURCE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**ENVIRONMENT, "PYTHONPATH": path, "AFINA_AUDITS": str(site / "audits")}


class Session:
    """One process that has the plug-in installed and runs command lines, one after the other."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SESSION],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fail(self, *arguments: object) -> tuple[int, str, str]:
        """Exit status, output and errors of a command."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(word) for word in arguments]) + "\n")
        self.process.stdin.flush()
        status, out, err = json.loads(self.process.stdout.readline())
        return status, out, err

    def text(self, *arguments: object) -> str:
        """What a command prints; it ends well, or asks for a review."""
        status, out, err = self.fail(*arguments)
        assert status in (0, 3), f"{arguments}\n{out}\n{err}"
        return out

    def __call__(self, *arguments: object) -> dict[str, Any]:
        """The result of a command as JSON."""
        return dict(json.loads(self.text(*arguments, "--json").strip().splitlines()[-1]))


@pytest.fixture(scope="module")
def run(environment: dict[str, str]) -> Iterator[Session]:
    session = Session(environment)
    yield session
    assert session.process.stdin is not None
    session.process.stdin.close()
    assert session.process.wait(60) == 0


@pytest.mark.slow
def test_formats_file_of_the_plugin_is_generated(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "afina.adapters.formats", "vera", tmp_path / "formats.json"]
    subprocess.run(command, env=environment, check=True)
    stored = (ROOT / "plugin" / "afina_vera" / "formats.json").read_text()
    assert (tmp_path / "formats.json").read_text() == stored


@pytest.mark.slow
def test_help_names_the_settings_of_the_plugin(run: Session) -> None:
    assert "--vera.seed" in run.text("train", "--help")
    assert "mean" in run.text("combine", "--help")


@pytest.mark.slow
def test_method_of_the_plugin_is_planned(run: Session, tiny: Path, chats: Path) -> None:
    plan = ("plan", chats, "--base", tiny, "--method", "vera", "--rank", 4, "--vera.seed", 7)
    assert run(*plan)["cost"]


@pytest.mark.slow
def test_unknown_method_lists_the_plugin(run: Session, chats: Path) -> None:
    status, _, errors = run.fail("plan", chats, "--method", "verra")
    assert status == 2 and "vera" in errors


@pytest.mark.slow
def test_method_of_the_plugin_goes_through_every_command(
    run: Session, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    shared = ("--base", tiny, "--method", "vera", "--rank", 4, "--vera.seed", 7)
    train = ("train", chats, *shared, "--max-steps", 8, "--learning-rate", 0.05)
    train += ("--gradient-checkpointing", "off")
    first = run(*train, "--output-dir", tmp_path / "one")
    assert first["losses"]["eval_loss_after"] < first["losses"]["eval_loss_before"]
    again = run(*train, "--output-dir", tmp_path / "two", "--seed", 1)
    assert again["adapter"] != first["adapter"]

    evaluated = run("eval", tmp_path / "one")
    assert evaluated["after"]["loss"] == pytest.approx(first["losses"]["eval_loss_after"], 1e-4)
    assert run("show", tmp_path / "one")["method"] == "vera"

    both = (tmp_path / "one", tmp_path / "two")
    merged = run("merge", both[0], "--output-dir", tmp_path / "merged")
    assert merged["kl"] < 1e-4
    combine = ("combine", *both, "--merge-method", "mean", "--rank", 8)
    run(*combine, "--output-dir", tmp_path / "mean")
    summed = ("combine", *both, "--output-dir", tmp_path / "sum")
    assert run(*summed)["kind"] == "composition"

    audit = run("audit", tmp_path / "one")
    assert not [f for f in audit["findings"] if f["gate"] == "files" and f["level"] == "block"]


@pytest.mark.slow
def test_objective_of_the_plugin_trains(
    run: Session, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    assert "halved" in run.text("train", "--help")
    shared = ("--base", tiny, "--max-steps", 2, "--gradient-checkpointing", "off")
    first = []
    for name in ("sft", "halved"):
        command = ("train", chats, "--objective", name, *shared, "--output-dir", tmp_path / name)
        run(*command)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        first.append(json.loads(lines[0])["loss"])
    assert first[1] == pytest.approx(0.5 * first[0], rel=1e-5)
    assert run("eval", tmp_path / "halved")["after"]
