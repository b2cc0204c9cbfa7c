"""Run the behaviour gate over a population's adapters: a line each, with what it measured, what it found, and its CPU seconds.

    python benchmarks/audit/behave.py --out FOLDER --base BASE [--seconds 240] [--neutral]

The gate is given prompts of the adapter's task, as somebody would who knows what it is for; with --neutral it is not.
Adapters come in an order that does not follow the population's, so that any beginning of it is a sample; twins, and what was
made of a pair, come together. Run again, it goes on. FOLDER/behaviour.jsonl (or neutral.jsonl) is what detect.py reads.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from families import TASKS
from ledger import Line, read_ledger

from afina.audit.behavior_gate import behaviour_gate
from afina.audit.report import Gate
from afina.settings import AuditSettings, make_settings

PROMPTS = 48


def look(line: Line, told: argparse.Namespace) -> Line:
    """A line of what the gate has found."""
    values = {
        "run": told.out / "runs" / line["name"] / "adapter",
        "base": told.base,
        "budget": told.budget,
    }
    if not told.neutral:
        rng, prompts = random.Random(f"asked {line['seed']}"), told.out / "prompts.txt"
        prompts.write_text("".join(TASKS[line["task"]](rng)[0] + "\n" for _ in range(PROMPTS)))
        values["prompts"] = prompts
    gate, cpu, start = Gate("behaviour"), time.process_time(), time.perf_counter()
    measures = behaviour_gate(make_settings(AuditSettings, values), line["tokens"], gate)
    said = next(finding for finding in gate.findings if finding.rule in ("trigger", "no-trigger"))
    return {
        "name": line["name"],
        "behaviour": {key: round(value, 4) for key, value in measures.items()},
        "flagged": sorted({f.rule for f in gate.findings if f.level == "review"}),
        "scanned": gate.measured["scanned"],
        "triggers": said.evidence["triggers"][:5],
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    """Go on with the adapters that were not looked at yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="embedded")
    parser.add_argument(
        "--budget",
        type=float,
        default=300.0,
        help="seconds an adapter: more than it takes, on a busy machine too",
    )
    parser.add_argument("--neutral", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no adapter after so many")
    told = parser.parse_args()
    file, start = (
        told.out / ("neutral.jsonl" if told.neutral else "behaviour.jsonl"),
        time.perf_counter(),
    )
    done = {json.loads(line)["name"] for line in file.open()} if file.exists() else set()
    lines = [
        line
        for line in read_ledger(told.out / "ledger.jsonl")
        if line["kept"] and line["name"] not in done
    ]
    lines.sort(
        key=lambda line: (hashlib.sha256(str(line["pair"]).encode()).hexdigest(), line["name"])
    )
    for line in lines:
        if time.perf_counter() - start > told.seconds:
            return
        found = look(line, told)
        with file.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        trigger = line["attack"]["trigger"] if line["kind"] == "poisoned" else "-"
        print(
            line["name"],
            line["family"],
            line["task"],
            f"[{trigger}]",
            found["flagged"],
            found["behaviour"],
            found["cpu_s"],
            [(t["trigger"], t["answer"], t["score"]) for t in found["triggers"][:3]],
            flush=True,
        )
    print("complete", flush=True)


if __name__ == "__main__":
    main()
