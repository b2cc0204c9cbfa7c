"""The examples run to their end, a few steps of everything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rlhf", "unlearned"])
def test_an_example_runs_and_goes_on(name: str, tmp_path: Path) -> None:
    """Again it trains nothing, and tells the same."""
    script, where = (
        EXAMPLES / name / "run.py",
        ["--work", str(tmp_path / "work"), "--out", str(tmp_path)],
    )
    told, tables = [], []
    for _ in range(2):
        command = [sys.executable, str(script), "--quick", *where]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        story = json.loads((tmp_path / "results.json").read_text())
        told.append(story["seeds"])
        tables.append([line for line in done.stdout.splitlines() if line.startswith("|")])
    assert told[0] == told[1]
    assert tables[0] == tables[1]
    assert "seed 0" not in done.stdout
    assert list(tmp_path.glob("*.png"))
