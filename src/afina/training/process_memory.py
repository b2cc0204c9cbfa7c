"""The most memory that this process has held. No torch here: benchmarks ask the same of other libraries."""

import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def process_peak_mb() -> float:
    """The most RAM that this process has held, in MB, since it began."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text() if STATUS.exists() else ""):
        return (
            int(found[1]) * 1024 / 1e6
        )  # ru_maxrss would begin at the peak of the process that started this one
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, else KiB
