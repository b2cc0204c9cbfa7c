"""Set the constants of `afina plan`'s memory: `python benchmarks/plan_fit.py [--folder F]`. Six minutes; a second time, seconds.

Runs that are none of plan_accuracy.py's cases (other sizes, lengths and batches) are trained for a few steps, each in a
process of its own. Then SLACK and HOLES of planning/cost.py and BESIDES of planning/forecast.py are looked for on a
grid: those with which no run is planned under what it took plus MARGIN, and the worst is the least over. The best lines are
printed; a person writes one into the code. What was trained is kept in the folder.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import plan_accuracy
from common import run_side

MARGIN = 0.02  # the same run takes up to 4% more or less from one time to the next
plan_accuracy.SIZES |= {
    "20M": (384, 1152, 8, 6, 2, 12000),
    "90M": (640, 1920, 12, 10, 5, 24000),
    "170M": (896, 2560, 14, 14, 7, 32000),
    "300M": (1024, 4096, 18, 16, 8, 50000),
}
case = plan_accuracy.case
RUNS = [
    case("20M", "lora", 4096, 256),
    case("20M", "lora", 2048, 128, dtype="float32"),
    case("20M", "dora", 4096, 256, "all"),
    case("20M", "mora", 4096, 256),
    case("20M", "full", 2048, 128),
    case("90M", "lora", 2048, 256),
    case("90M", "lora", 2048, 1024),
    case("90M", "lora", 2048, 256, "all", rank=64),
    case("90M", "dora", 2048, 128, 2),
    case("90M", "qlora", 1024, 512),
    case("90M", "mora", 2048, 512, "all"),
    case("90M", "full", 1024, 128, 2),
    case("170M", "dora", 1024, 256),
    case("170M", "qdora", 1024, 128, "all"),
    case("170M", "freeze", 1024, 256),
    case("170M", "mora", 1024, 128),
    case("300M", "lora", 512, 128),
    case("300M", "full", 256, 128, optimizer="adamw-8bit"),
]


def count(number: int, folder: Path) -> list[list[float]]:
    """Bytes that the plan counts for run `number` with all of the grid's SLACK and HOLES, and without PROCESS_BYTES."""
    from afina.planning.machine import PROCESS_BYTES, detect_machine
    from afina.planning.model_shape import read_model_shape
    from afina.planning.run_step import full_load, make_step
    from afina.settings import PlanSettings, make_settings

    asked = RUNS[number]
    settings = make_settings(
        PlanSettings, {"base": str(folder / asked["size"])} | asked["settings"]
    )
    place = detect_machine(settings)
    shape = read_model_shape(settings, place.device)
    step, load = make_step(shape, settings, place.device), full_load(shape, settings)
    return [
        [step.memory(load, place.libraries - PROCESS_BYTES, place.heap, gaps).peak] for gaps in GRID
    ]


GRID = [(slack / 20, holes / 4) for slack in range(11) for holes in range(17)]
BESIDES_TRIED = range(0, 121, 10)  # MB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=("make", "train", "count"))
    parser.add_argument("--case", type=int)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "afina-plan-fit"
    )
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.side:
        made: Any = (
            count
            if arguments.side == "count"
            else lambda n, f: plan_accuracy.side(arguments.side, RUNS[n], n, f)
        )
        print(json.dumps(made(arguments.case, folder)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "general.txt").write_text("A bird sat on a stone by the road.\n")
    took, counted = [], []
    for number, run in enumerate(RUNS):
        plan_accuracy.make_rows(folder / f"{number}.txt", 3 * run["settings"]["batch_tokens"])
        if not (folder / run["size"] / "tokenizer.json").exists():
            plan_accuracy.told("make", run, number, folder, __file__)
        took.append(plan_accuracy.told("train", run, number, folder, __file__)["bytes"])
        counted.append(
            run_side(
                sys.executable,
                [__file__, "--side", "count", "--case", str(number), "--folder", str(folder)],
            )
        )
        print(
            f"{number:2} {run['size']:5} {run['settings']['method']:6} {run['settings']['checkpointing']!s:4} {took[-1] / 1e6:8.1f} MB"
        )
    lines = []
    for (at, gaps), besides in itertools.product(enumerate(GRID), BESIDES_TRIED):
        off = [
            (each[at][0] + 1e6 * besides) / bytes_ - 1
            for each, bytes_ in zip(counted, took, strict=True)
        ]
        lines.append(
            (min(off) >= MARGIN, -max(off) if min(off) >= MARGIN else min(off), gaps, besides, off)
        )
    for fits, _, gaps, besides, off in sorted(lines, key=lambda line: line[:2], reverse=True)[:12]:
        shown = " ".join(f"{100 * each:+.0f}" for each in off)
        print(
            f"SLACK {gaps[0]} HOLES {gaps[1]} BESIDES {besides} MB: {'' if fits else 'not '}all over; in %: {shown}"
        )


if __name__ == "__main__":
    main()
