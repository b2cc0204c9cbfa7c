"""What a method costs: a few steps of it in a process of its own, before the comparison begins.

Runs side by side share their time and memory, so that neither can be told apart; and a method that kills its process
(out of memory) takes nobody along. The budget is planned from these figures.

    python -m afina.comparison.cost_probe SETTINGS.json
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from afina.errors import AfinaError
from afina.io.atomic import write_json
from afina.planning.checkpointing_policy import train
from afina.settings import TrainSettings, resolved
from afina.training.trainer import read_metrics

STEPS = 4  # the first is slower than the others, and does not count
WATTS = 10.0  # of a busy CPU core, taken where no meter can be read
ENERGY_COUNTER = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def measure(settings: TrainSettings) -> dict[str, Any]:
    """Seconds a step, seconds besides, MB at the peak, joules a step and how they were found; here and now."""
    meter, cpu, start = _joules(settings), time.process_time(), time.perf_counter()
    run = train(settings)
    wall, busy = time.perf_counter() - start, time.process_time() - cpu
    ticks = [line["seconds"] for line in read_metrics(run.folder)]
    step = statistics.median(ticks[1:] or ticks)
    now = _joules(settings)
    if meter is not None and now is not None and now[0] > meter[0]:
        watts, source = (now[0] - meter[0]) / wall, meter[1]
    elif run.record["base"].get("dtype") and settings.device in ("auto", "cpu") and not _on_gpu():
        watts, source = WATTS * busy / wall, "assumed"
    else:
        watts, source = None, "unknown"
    return {
        "step_seconds": step,
        "other_seconds": max(0.0, wall - sum(ticks)),
        "peak_mb": run.record["peak_memory_mb"],
        "cores": busy / wall,
        "joules_a_step": None if watts is None else watts * step,
        "energy_source": source,
        "trainable_parameters": run.record["trainable_parameters"],
        "adapter_kb": run.record["adapter_kb"],
        "steps": len(ticks),
    }


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0


def _joules(settings: TrainSettings) -> tuple[float, str] | None:
    """Joules of this machine's processor since some time, where its meter can be read (that of all its processes)."""
    if settings.device not in ("auto", "cpu") or _on_gpu():
        return None
    try:
        return float(ENERGY_COUNTER.read_text()) / 1e6, "meter"
    except (OSError, ValueError):
        return None


def measure_in_subprocess(settings: TrainSettings, seconds: float | None = None) -> dict[str, Any]:
    """`measure`, in a process of its own; {"failed": why} where that ends badly, with "late" where `seconds` were over."""
    assert settings.output_dir is not None
    asked = settings.output_dir.with_suffix(".asked.json")
    write_json(asked, resolved(settings))
    command = [sys.executable, "-m", "afina.comparison.cost_probe", str(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {
            "failed": f"{STEPS} steps took longer than the {seconds:.2g} s that the budget leaves for them",
            "late": True,
        }
    finally:
        asked.unlink(missing_ok=True)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    if done.returncode in (-9, 137):
        return {"failed": "its process was killed: most likely it was out of memory"}
    said = done.stderr.strip().splitlines() or ["it said nothing"]
    return {"failed": said[-1]}


def main(asked: str) -> int:
    """The process: one JSON object as the last line, or why there is none."""
    try:
        print(json.dumps(measure(TrainSettings(**json.loads(Path(asked).read_text())))))
    except (AfinaError, RuntimeError, MemoryError) as error:
        print(str(error).splitlines()[0] if str(error) else type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
