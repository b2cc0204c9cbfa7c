"""Cost of a method, measured on a few steps in a subprocess before the comparison starts.

Concurrent runs share time and memory, which cannot be attributed to one of them; and a method that
runs out of memory ends its own process only. The budget is planned from these figures.

    python -m afina.comparison.cost_probe SETTINGS.json
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from afina.errors import AfinaError
from afina.io.atomic import write_json
from afina.io.subprocesses import SubprocessError, run_in_subprocess
from afina.settings import TrainSettings, resolved
from afina.training.train import train
from afina.training.trainer import read_metrics

MODULE = "afina.comparison.cost_probe"
STEPS = 4  # the first is slower than the others and is not counted
WATTS = 10.0  # of a busy CPU core, taken where no meter can be read
ENERGY_COUNTER = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def measure(settings: TrainSettings) -> dict[str, Any]:
    """Run a few steps here; return seconds, joules per step, peak MB and adapter size."""
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
    """Return the processor's energy counter in joules (all processes), None if unreadable."""
    if settings.device not in ("auto", "cpu") or _on_gpu():
        return None
    try:
        return float(ENERGY_COUNTER.read_text()) / 1e6, "meter"
    except (OSError, ValueError):
        return None


def measure_in_subprocess(settings: TrainSettings, seconds: float | None = None) -> dict[str, Any]:
    """Return `measure` of a subprocess, or {"failed": why}, with "late" after a timeout."""
    assert settings.output_dir is not None
    request = settings.output_dir.with_suffix(".request.json")
    write_json(request, resolved(settings))
    try:
        return dict(run_in_subprocess(MODULE, str(request), timeout=seconds))
    except SubprocessError as error:
        if error.is_timeout:
            what = f"{STEPS} steps took longer than the {seconds:.2g} s that the budget leaves"
            return {"failed": f"{what} for them", "late": True}
        if error.is_killed:
            return {"failed": "its process was killed: most likely it was out of memory"}
        return {"failed": error.what}
    finally:
        request.unlink(missing_ok=True)


def main(request: str) -> int:
    """Print the measures as one JSON line, or the error; return the exit status."""
    try:
        print(json.dumps(measure(TrainSettings(**json.loads(Path(request).read_text())))))
    except (AfinaError, RuntimeError, MemoryError) as error:
        print(str(error).splitlines()[0] if str(error) else type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
