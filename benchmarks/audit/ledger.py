"""The population's ledger: a line an adapter while it is made; packed, small enough for the repository.

python benchmarks/audit/ledger.py FOLDER/ledger.jsonl --pack benchmarks/results/audit_ledger.json.gz [--behaviour FILE ...]
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]
LEFT = ("tokens",)  # not packed


def read_ledger(file: Path, *beside: Path | None) -> list[Line]:
    """Lines of a ledger, packed or not; those of files `beside` it are added to the lines of the same name."""
    if file.suffix == ".gz":
        told = json.loads(gzip.decompress(file.read_bytes()))
        lines = [
            line
            | {
                "features": dict(zip(told["names"], line["features"], strict=True)),
                "group": told["groups"][line["group"]],
            }
            for line in told["lines"]
        ]
    else:
        lines = [json.loads(text) for text in file.open()]
    for more in (each for each in beside if each is not None):
        added = {line["name"]: line for line in map(json.loads, more.open())}
        lines = [line | added.get(line["name"], {}) for line in lines]
    return lines


def pack(lines: list[Line], file: Path) -> None:
    """Names of features and kinds once; the same bytes for the same lines."""
    names = sorted({name for line in lines for name in line["features"]})
    groups: list[Any] = []
    packed = []
    for line in lines:
        if line["group"] not in groups:
            groups.append(line["group"])
        numbers = {
            "features": [line["features"].get(name, 0.0) for name in names],
            "group": groups.index(line["group"]),
        }
        packed.append({key: value for key, value in line.items() if key not in LEFT} | numbers)
    text = json.dumps({"names": names, "groups": groups, "lines": packed}, separators=(",", ":"))
    file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def main() -> None:
    """Pack a ledger."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--behaviour", type=Path, nargs="*", default=[])
    told = parser.parse_args()
    pack(read_ledger(told.ledger, *told.behaviour), told.pack)
    print(f"{told.pack}: {told.pack.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
