"""What every benchmark shares: sides run in turn, the machine's roofline, results on disk, RESULTS.md.

A benchmark runs each side as a process of its own (A B A B ...), in the environment that the side needs, takes
medians, prints a table and, as its last line, one JSON object; the same with every repeat goes to results/NAME.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
SHARED = ROOT.parent.parent / "shared"  # real material, where it exists
PEERS = ROOT.parent / ".venv-peers" / "bin" / "python"  # made by `make peers`


def run_side(
    python: str | Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run one side; its last line is a JSON object of figures."""
    import os

    done = subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def interleave(
    sides: Mapping[str, tuple[str | Path, Sequence[str]]], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Each side `repeats` times, in turn."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, (python, arguments) in sides.items():
            figures = run_side(python, arguments)
            results[name].append(figures)
            print(f"{repeat + 1}/{repeats} {name}: {json.dumps(figures)}", flush=True)
    return results


def peak_mb() -> float:
    """The most memory that this process has held, in MB; also in the peers' environment, which has no afina."""
    sys.path.append(str(ROOT.parent / "src"))
    from afina.training.process_memory import process_peak_mb

    return process_peak_mb()


def median(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of a figure over the repeats."""
    return statistics.median(row[key] for row in rows)


def roofline() -> dict[str, float]:
    """The machine's ceilings, warmed up: bf16 product rate (GFLOP/s), copy bandwidth (GB/s, read and write)."""
    import torch

    def rate(run: Any, work: float) -> float:
        for _ in range(3):
            run()
        times = []
        for _ in range(9):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return work / statistics.median(times) / 1e9

    a, w = torch.randn(512, 1024).bfloat16(), torch.randn(4096, 1024).bfloat16()
    x = torch.randn(64 << 20)
    y = torch.empty_like(x)
    return {
        "bf16_gflops": rate(lambda: a @ w.T, 2 * 512 * 1024 * 4096),
        "copy_gbs": rate(lambda: y.copy_(x), 8 * x.numel()),
    }


def publish(
    name: str,
    figures: Mapping[str, float],
    targets: Mapping[str, Sequence[Any]],
    repeats: Mapping[str, Any],
    machine: Mapping[str, float],
) -> None:
    """Write results/NAME.json, renew RESULTS.md, print the last line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    versions = {package: _version(package) for package in ("torch", "transformers", "afina")}
    story = {
        "name": name,
        "figures": {key: round(value, 4) for key, value in figures.items()},
        "targets": {key: list(value) for key, value in targets.items()},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions | {"python": platform.python_version()},
        "roofline": {key: round(value, 1) for key, value in machine.items()},
        "repeats": repeats,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(story, indent=1) + "\n")
    (ROOT / "RESULTS.md").write_text(results_page())
    print(json.dumps({key: story[key] for key in ("name", "figures", "targets")}))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # afina used by its path, on a lent machine
        return "from source"


def met(value: float, target: Sequence[Any]) -> bool:
    """Whether a figure reaches its target, e.g. (">=", 5)."""
    return value >= target[1] if target[0] == ">=" else value <= target[1]


def results_page() -> str:
    """RESULTS.md, from the JSON files in results/ and the notes in NOTES.md."""
    lines = [
        "# Results",
        "",
        "Generated from results/*.json by the benchmarks; do not edit. Notes: NOTES.md.",
        "",
    ]
    for file in sorted(RESULTS.glob("*.json")):
        story = json.loads(file.read_text())
        ceilings = ", ".join(f"{key} {value}" for key, value in story["roofline"].items())
        lines += [
            f"## {story['name']}",
            "",
            f"{story['date']}, commit {story['commit']}; roofline: {ceilings}",
            "",
        ]
        lines += ["| figure | measured | target | reached |", "|---|---|---|---|"]
        for key, value in story["figures"].items():
            target = story["targets"].get(key)
            goal = f"{target[0]} {target[1]}" if target else ""
            lines.append(
                f"| {key} | {value:g} | {goal} | {('yes' if met(value, target) else 'no') if target else ''} |"
            )
        lines.append("")
    notes = ROOT / "NOTES.md"
    return "\n".join(lines) + ("\n" + notes.read_text() if notes.exists() else "")
