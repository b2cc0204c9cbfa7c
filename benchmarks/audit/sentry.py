"""What AdapterSentry says of a population: a line an adapter, for detect.py --sentry.

    python -m venv V && V/bin/pip install adaptersentry
    python benchmarks/audit/sentry.py --out FOLDER --program V/bin/adaptersentry

Its verdict is the score (allow 0, review 1, block 2): it has no finer one. `applies` is whether it compared the adapter's
layers with each other, which it does from 16 of a kind on; with fewer it has only its checks of structure.
"""

import argparse
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

VERDICTS = ("allow", "review", "block")
WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    """Scan all adapters of the ledger in one batch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--program", default="adaptersentry")
    told = parser.parse_args()
    files = {
        line["name"]: (told.out / "runs" / line["name"] / "adapter" / WEIGHTS).resolve()
        for line in map(json.loads, (told.out / "ledger.jsonl").open())
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "list.txt").write_text("".join(f"{file}\n" for file in files.values()))
        words = [
            "batch",
            "--input-list",
            str(place / "list.txt"),
            "--output-dir",
            folder,
            "--no-cache",
            "--workers",
            "1",
            "--run-id",
            "bench",
        ]
        subprocess.run(
            [told.program, *words], check=True, env={"HOME": folder, "PATH": "/usr/bin:/bin"}
        )
        found = {}
        for line in map(json.loads, (place / "bench" / "run.jsonl").open()):
            found[line["artifact"]["content_hash"]] = (
                line["verdict"]["action"],
                line["anomaly"]["intra"] is not None,
            )
    lines = []
    for name, file in files.items():
        verdict, applies = found[f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"]
        lines.append({"name": name, "sentry": VERDICTS.index(verdict), "applies": applies})
    (told.out / "sentry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(
        {
            verdict: sum(line["sentry"] == level for line in lines)
            for level, verdict in enumerate(VERDICTS)
        },
        "compared layers of",
        sum(line["applies"] for line in lines),
        "of",
        len(lines),
    )


if __name__ == "__main__":
    main()
