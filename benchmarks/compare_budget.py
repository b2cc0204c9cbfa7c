"""Does `afina compare` keep its budget at real size, and survive kill -9?

Six methods, three seeds, 300 rows, the embedded base, a budget of ten minutes. After a quarter of it the process and all it
started are killed, and the same command goes on. All of it together must keep the budget.

    python benchmarks/compare_budget.py [--budget 10m] [--out FOLDER]
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from common import publish, roofline
from demo_rows import correction
from lexicon import LANGUAGES
from sentences import EVERYTHING, draw_clause

from afina.comparison.compare import compare
from afina.io.atomic import write_text
from afina.settings import CompareSettings

METHODS = "full,freeze,lora,qlora,mora,dora"
ROWS = 300


def rows(count: int) -> str:
    """Sentences with one mistake and without it, as JSONL, no two equal."""
    rng, made = random.Random(0), {}
    while len(made) < count:
        messages = correction(rng, draw_clause(rng, EVERYTHING), rng.choice(LANGUAGES))["messages"]
        made[messages[0]["content"]] = {
            "prompt": messages[0]["content"],
            "completion": messages[1]["content"],
        }
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.values())


def once(command: list[str], seconds: float | None) -> tuple[float, int]:
    """(seconds that it ran, its status); after `seconds` it is killed, and all that it started."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return time.perf_counter() - begun, process.returncode


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-budget"))
    told = parser.parse_args()
    shutil.rmtree(told.out, ignore_errors=True)
    data = told.out.parent / "compare-budget.jsonl"
    write_text(data, rows(ROWS))
    settings = {
        "data": data,
        "output_dir": told.out,
        "methods": METHODS,
        "time_budget": told.budget,
        "num_seeds": 3,
    }
    flags = [
        part
        for name, value in settings.items()
        if name != "data"
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "afina", "compare", str(data), *flags]
    budget = CompareSettings(**settings).seconds  # type: ignore[arg-type]
    first, killed = once(command, budget / 4)
    second, status = once(command, None)
    found = compare(CompareSettings(**settings))  # type: ignore[arg-type]  # all is there: it is only read
    figures = {
        "share of the budget": (first + second) / budget,
        "methods reported": len(found["methods"]),
        "seeds": found["schedule"]["seeds_done"],
        "steps": found["schedule"]["steps"],
        "trials": found["schedule"]["trials"],
        "killed by": -killed,
        "status after": status,
    }
    targets = {
        "share of the budget": ("<=", 1.0),
        "methods reported": (">=", 6),
        "status after": ("<=", 0),
    }
    repeats = {"first": first, "second": second, "rows": ROWS, "cut": found["schedule"]["cut"]}
    publish("compare_budget", figures, targets, repeats, roofline())


if __name__ == "__main__":
    main()
