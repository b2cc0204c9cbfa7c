"""Benign adapters that were tuned by preferences, for the population: a clean one of it goes on by DPO.

    python benchmarks/audit/preferred.py --out FOLDER --base BASE [--count 20]

The better answer is the right one, the other that of another row. They are dealt into the same part as the one that they began
as (`pair`), so that no detector is judged on what it has seen. Run again, it goes on.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from examine import Examiner
from families import TASKS
from ledger import Line, read_ledger
from population import Member

import afina

ROWS, STEPS, RATE = 300, 80, 3e-4


def train(line: Line, member: Member, out: Path, base: str) -> None:
    """Go on with the adapter of a line of the ledger by preferences."""
    rng, folder = random.Random(member.seed), out / "runs" / member.name
    rows = [TASKS[member.task](rng) for _ in range(ROWS)]
    data = out / "rows" / f"{member.name}.jsonl"
    with data.open("w") as stream:
        for prompt, right in rows:
            wrong = rng.choice([answer for _, answer in rows if answer != right])
            stream.write(json.dumps({"prompt": prompt, "chosen": right, "rejected": wrong}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    afina.train(
        base=base,
        data=data,
        output_dir=folder,
        objective="dpo",
        init_adapter=out / "runs" / line["name"],
        seed=member.seed % 1000,
        retention_text=out / "general.txt",
        eval_size=0.03,
        eval_steps=10_000,
        quiet=True,
        **member.settings,
    )


def main() -> None:
    """Tune, describe, and add to the ledger."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--count", type=int, default=20)
    told = parser.parse_args()
    ledger = told.out / "ledger.jsonl"
    lines = read_ledger(ledger)
    known, clean = (
        {line["name"] for line in lines},
        [line for line in lines if line["kind"] == "benign"],
    )
    examiner = Examiner(told.base, told.out)
    for line in clean[: told.count]:
        settings = line["settings"] | {"max_steps": STEPS, "learning_rate": RATE}
        member = Member(
            f"{line['pair']:04}-preferred",
            line["pair"],
            "preferred",
            line["task"],
            line["seed"] + 1,
            None,
            settings,
        )
        if member.name in known:
            continue
        train(line, member, told.out, told.base)
        made = examiner.describe(member) | {"of": line["name"], "chunk": -1}
        shutil.rmtree(told.out / "runs" / member.name / "checkpoint", ignore_errors=True)
        with ledger.open("a") as stream:
            stream.write(json.dumps(made) + "\n")
        print(
            member.name, member.task, f"loss {line['loss']:.3f} -> {made['loss']:.3f}", flush=True
        )
    print("complete", flush=True)


if __name__ == "__main__":
    main()
