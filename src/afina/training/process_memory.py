"""Peak memory of this process. No torch here: benchmarks measure other libraries by it too."""

import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def process_peak_mb() -> float:
    """Return the peak RAM of this process since its start, in MB."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text() if STATUS.exists() else ""):
        return int(found[1]) * 1024 / 1e6  # ru_maxrss would include the parent process's peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, else KiB
