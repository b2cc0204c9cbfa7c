"""Make the calibrations that come with afina, or your own, from a population's ledger: one file for each kind with enough benign.

python benchmarks/audit/calibrate.py LEDGER [--behaviour BEHAVIOUR.jsonl] --out src/afina/audit/calibrations
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from ledger import Line, read_ledger

from afina.audit.calibration import MIN_POPULATION, PopulationKey, calibrate


def main() -> None:
    """Write a file for each kind that has at least twice FEWEST benign adapters: half fit, half judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--behaviour", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="embedded")
    told = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    groups: dict[str, list[Line]] = {}
    for line in read_ledger(told.ledger, told.behaviour):
        if line["kept"]:
            groups.setdefault(json.dumps(line["group"]), []).append(line)
    told.out.mkdir(parents=True, exist_ok=True)
    for text, lines in groups.items():
        kind, benign = json.loads(text), [x for x in lines if x["kind"] != "poisoned"]
        if len(benign) < 2 * MIN_POPULATION:
            print(
                f"{len(benign)} benign of {kind['method']}, rank {kind['rank']}, {len(kind['layers'])} layers: too few"
            )
            continue
        bad = [x["features"] for x in lines if x["kind"] == "poisoned"]
        bad = (
            bad if len(bad) >= MIN_POPULATION else []
        )  # a regression on fewer learns them by heart, and costs half of alpha
        made = calibrate(
            PopulationKey(**{**kind, "layers": tuple(kind["layers"])}),
            [x["features"] for x in benign],
            bad,
        )
        scores = sorted(x["behaviour"]["trigger"] for x in benign if "behaviour" in x)
        recipe = (
            f"benchmarks/audit/population.py at {commit}: {len(benign)} benign, {len(bad)} poisoned"
        )
        file = told.out / f"{told.name}-{kind['method']}-{kind['rank']}.json"
        replace(made, triggers=np.array(scores) if scores else None, recipe=recipe).write(file)
        print(
            f"{file}: judges by {made.count} benign, {len(scores)} trigger scores, {file.stat().st_size / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()
