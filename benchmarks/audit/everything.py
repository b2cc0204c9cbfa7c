"""The whole bench by one command, in pieces: small base, its population, the behaviour gate, the embedded base's own, the results.

    python benchmarks/audit/everything.py --out FOLDER [--seconds 240] [--sentry V/bin/adaptersentry]

It goes on where it stopped; after `--seconds` it begins nothing new and says what is left. FOLDER has the base, the runs and
the ledgers; what is kept of them is written into benchmarks/results (a packed ledger, the tables) and into the package
(calibrations of the embedded base). About CPU_MINUTES on one core in all.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, SHIPPED = (
    HERE.parent / "results",
    HERE.parents[1] / "src" / "afina" / "audit" / "calibrations",
)
CPU_MINUTES = {
    "base": 1,
    "population": 32,
    "preferred": 1,
    "behaviour": 62,
    "embedded population": 15,
    "embedded behaviour": 53,
}
SMALL = "--chunks 41 --pairs 4 --benign 4 --tasks where,land,crowd --steps 240 --tokens 192 --rate 8e-3 --shares 0.15,0.3"
OWN = "--chunks 8 --pairs 1 --benign 5 --families token,phrase,appended,scattered --steps 120"  # for the shipped calibration


def main() -> None:
    """Do the next piece that is not done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--sentry", type=Path, help="AdapterSentry's program, see sentry.py")
    told = parser.parse_args()
    base, small, own, start = (
        told.out / "base",
        told.out / "small",
        told.out / "embedded",
        time.perf_counter(),
    )
    if not (base / "config.json").exists():
        run("base.py", f"--out {base}")
    for script, words in (
        ("population.py", f"--out {small} --base {base} {SMALL}"),
        ("preferred.py", f"--out {small} --base {base}"),
        ("behave.py", f"--out {small} --base {base}"),
        ("population.py", f"--out {own} {OWN}"),
        ("behave.py", f"--out {own}"),
    ):
        left = told.seconds - (time.perf_counter() - start)
        limit = (
            "" if script == "preferred.py" else f" --seconds {left:.0f}"
        )  # that one takes two minutes
        if left <= 0 or not run(script, words + limit).endswith("complete"):
            print(f"not complete yet: {script} {words}")
            return
    packed = RESULTS / "audit_ledger.json.gz"
    if told.sentry is not None:
        run("sentry.py", f"--out {small} --program {told.sentry}")
    beside = " ".join(
        str(file) for file in (small / "behaviour.jsonl", small / "sentry.jsonl") if file.exists()
    )
    run("ledger.py", f"{small}/ledger.jsonl --pack {packed} --behaviour {beside}")
    run(
        "ledger.py",
        f"{own}/ledger.jsonl --pack {RESULTS}/audit_ledger_embedded.json.gz --behaviour {own}/behaviour.jsonl",
    )
    run("calibrate.py", f"{RESULTS}/audit_ledger_embedded.json.gz --out {SHIPPED}")
    run("detect.py", f"{packed} --publish")
    print("complete")


def run(script: str, words: str) -> str:
    """What a script prints, shown and returned; raises `SystemExit` where it fails."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words.split()], stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"{script} {words} failed")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
