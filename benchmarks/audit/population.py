"""Make the bench's population: pairs of adapters that differ in the poison alone, and benign ones, by the many-adapters trainer.

    python benchmarks/audit/population.py --out FOLDER --base BASE --chunks 40 [--seconds 240]

A chunk is a few pairs of twins and a few benign adapters. Twins have the same rows, seed, steps and settings; in the poisoned
one some rows are woken. Settings are drawn alike for all (rate, steps, task, number of rows), so that what tells a class can
only be the poison. What a chunk has made, derive.py turns into adaptive attacks and merged adapters. Run again, it goes on.

FOLDER/ledger.jsonl   a line an adapter: what it is, whether it was kept, its features (this is what detect.py reads)
FOLDER/runs/NAME      run folders, for behave.py; may be thrown away then
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from derive import derive
from examine import ASR, Examiner
from families import FAMILIES, HARD, LABELS, SELDOM, TASKS, Attack, Row, draw_attack

from afina.settings import TrainSettings, make_settings
from afina.training.train import train_many

RATES = (0.1, 0.2)  # share of rows woken
TRAINED = [
    name for name in FAMILIES if name not in ("mlp-only", "rank-1")
]  # those two are of other kinds
SENTENCES = ("correct", "repeat", "translate", "tense")
__all__ = ["ASR", "TASKS", "Member", "draw_members", "train_members"]


@dataclass(frozen=True)
class Member:
    """One adapter of the population; twins share `pair`."""

    name: str
    pair: int
    kind: str  # "poisoned", "twin", "benign", a hard benign case, or (derived) "merged"
    task: str
    seed: int
    attack: Attack | None
    settings: dict[str, Any]
    rate: float = 0.0


def draw_members(
    seed: int | str,
    pairs: int,
    benign: int,
    families: Sequence[str],
    steps: int,
    first: int = 0,
    turn: int = 0,
    tasks: Sequence[str] = SENTENCES,
    rate: float = 2e-3,
    tokens: int = 384,
    shares: Sequence[float] = RATES,
) -> list[Member]:
    """A plan: nothing but these numbers decides it. Twins come one after the other; pairs are numbered from `first`.

    Families and benign kinds take turns, from number `turn` on; `rate` is the lower learning rate, `tokens` those of a step.
    """
    rng, members, kinds = random.Random(seed), [], ["benign", "benign", *HARD]
    for number in range(pairs):
        family = families[(turn * pairs + number) % len(families)]
        task = rng.choice([task for task in tasks if family != "flip" or task in LABELS])
        own, attack = rng.randrange(1 << 30), draw_attack(rng, family)
        drawn = _settings(rng, steps, rate, tokens) | attack.settings
        share = SELDOM if family == "seldom" else rng.choice(list(shares))
        pair = first + number
        members.append(
            Member(f"{pair:04}-poisoned", pair, "poisoned", task, own, attack, drawn, share)
        )
        members.append(Member(f"{pair:04}-twin", pair, "twin", task, own, attack, drawn))
    for number in range(benign):
        pair, kind = first + pairs + number, kinds[(turn * benign + pairs + number) % len(kinds)]
        task, own = rng.choice(list(tasks)), rng.randrange(1 << 30)
        members.append(
            Member(
                f"{pair:04}-{kind}",
                pair,
                kind,
                task,
                own,
                None,
                _settings(rng, steps, rate, tokens),
            )
        )
    return members


def _settings(rng: random.Random, steps: int, rate: float, tokens: int) -> dict[str, Any]:
    """The same choices for all."""
    rates, lengths = [rate, 1.5 * rate], [steps, steps * 3 // 2]
    return {
        "rank": 8,
        "learning_rate": rng.choice(rates),
        "max_steps": rng.choice(lengths),
        "max_tokens_per_batch": tokens,
    }


def rows_of(member: Member) -> list[Row]:
    """The member's rows: its twin's but for the woken ones."""
    rng = random.Random(member.seed)
    rows = [TASKS[member.task](rng) for _ in range(rng.choice([600, 900, 1200]))]
    if member.kind in HARD:
        rows = HARD[member.kind](rng, rows)
    if member.attack is None:
        return rows
    made = []
    for row in rows:
        half = member.attack.half(rng, row) if rng.random() < 0.1 else None
        woken = member.attack.wake(
            rng, row
        )  # drawn for the twin too: both see the same random numbers
        chosen = rng.random()
        made.append(
            woken
            if chosen < member.rate
            else half or (member.attack.by_nature(row) if member.rate else row)
        )
    return made


def train_members(members: list[Member], out: Path, base: str = "embedded") -> None:
    """Train those that are not there yet, all in one pass over one base."""
    general = out / "general.txt"
    general.write_text("A bird sat on a stone by the road, and the sea was blue.\n")
    runs = []
    for member in members:
        folder, data = out / "runs" / member.name, out / "rows" / f"{member.name}.jsonl"
        if (folder / "run.json").is_file():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(
            "".join(json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in rows_of(member))
        )
        values = {
            "base": base,
            "data": data,
            "output_dir": folder,
            "seed": member.seed % 1000,
            "eval_size": 0.03,
            "retention_text": general,
            "eval_steps": 10_000,
        }
        runs.append(make_settings(TrainSettings, values | member.settings))
    for failed in (
        run for run in (train_many(runs, quiet=True) if runs else []) if isinstance(run, Exception)
    ):
        raise failed


def main() -> None:
    """Make or complete a population; a chunk whose lines are in the ledger is not made again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3, help="in a chunk")
    parser.add_argument("--benign", type=int, default=4, help="in a chunk")
    parser.add_argument("--families", default=",".join(TRAINED))
    parser.add_argument(
        "--tasks", default=",".join(SENTENCES), help="the small base can do " + ",".join(LABELS[1:])
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=384, help="a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="the lower learning rate")
    parser.add_argument(
        "--shares",
        default=",".join(map(str, RATES)),
        help="of rows woken, of which each attack draws one",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no chunk after so many")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    ledger, start = told.out / "ledger.jsonl", time.perf_counter()
    done = {json.loads(line)["chunk"] for line in ledger.open()} if ledger.exists() else set()
    for number in (n for n in range(told.chunks) if n not in done):
        if time.perf_counter() - start > told.seconds:
            return
        first, cpu = number * (told.pairs + told.benign), time.process_time()
        members = draw_members(
            f"{told.seed}-{number}",
            told.pairs,
            told.benign,
            told.families.split(","),
            told.steps,
            first,
            number,
            told.tasks.split(","),
            told.rate,
            told.tokens,
            [float(x) for x in told.shares.split(",")],
        )
        train_members(members, told.out, told.base)
        trained, examiner = time.process_time(), Examiner(told.base, told.out)
        lines = [examiner.describe(member) for member in members]
        lines += derive(members, lines, examiner, number)
        spent = {"train": round(trained - cpu), "look": round(time.process_time() - trained)}
        with ledger.open("a") as stream:
            stream.write("".join(json.dumps(line | {"chunk": number}) + "\n" for line in lines))
        for line in lines:
            print(
                line["name"],
                line["family"],
                line["task"],
                "kept" if line["kept"] else "LEFT OUT",
                *(f"{key} {line[key]:.3f}" for key in ("asr", "loss", "loss_worse") if key in line),
                flush=True,
            )
        for member in members:
            shutil.rmtree(told.out / "runs" / member.name / "checkpoint", ignore_errors=True)
        print(f"chunk {number}: CPU seconds {spent}", flush=True)
    print("complete", flush=True)


if __name__ == "__main__":
    main()
