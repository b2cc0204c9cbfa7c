"""The examples run to their end, a few steps of everything."""

import io
import json
import runpy
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `python run.py --quick` prints; in this process, which has loaded torch already."""
    words = ["--quick", "--work", str(out / "work"), "--out", str(out)]
    printed = io.StringIO()
    with monkeypatch.context() as patch, chdir(out), redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(folder / "run.py"), *words])
        patch.setattr("afina.evaluation.retention.NUM_RETENTION_TOKENS", 512)
        patch.syspath_prepend(folder)
        for name in ("rules", "stacked"):  # those of another example
            sys.modules.pop(name, None)
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["rlhf", "unlearned"])
def test_an_example_runs_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again it trains nothing, and tells the same."""
    told, tables = [], []
    for _ in range(2):
        printed = run_example(EXAMPLES / name, tmp_path, monkeypatch)
        told.append(json.loads((tmp_path / "results.json").read_text())["seeds"])
        tables.append([line for line in printed.splitlines() if line.startswith("|")])
    assert told[0] == told[1]
    assert tables[0] == tables[1]
    assert "seed 0" not in printed
    assert list(tmp_path.glob("*.png"))
