"""Processes with bounds of time and memory."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

CPU_FACTOR = 4  # CPU seconds to seconds: a process with several threads


def limit_process(pid: int, memory: int | None, seconds: float | None = None) -> None:
    """Bound the memory (bytes) and CPU time of a process that has just begun.

    Other systems than Linux have no such bounds.
    """
    if sys.platform != "linux":
        return
    import resource

    with suppress(ProcessLookupError, PermissionError):
        if memory is not None:
            resource.prlimit(pid, resource.RLIMIT_DATA, (memory, memory))
        if seconds is not None:
            cpu = int(CPU_FACTOR * seconds) + 1
            resource.prlimit(pid, resource.RLIMIT_CPU, (cpu, cpu))


class BoundedProcess:
    """A command that reads a text and writes one."""

    def __init__(self, command: Sequence[str], given: str, seconds: float, memory: int) -> None:
        self._command, self._given = tuple(command), given
        self._seconds, self._memory = seconds, memory
        self._process: subprocess.Popen[str] | None = None
        self._is_killed, self._lock = False, threading.Lock()

    def run(self) -> tuple[int | None, str, str]:
        """Return its exit status (None after its time), output and messages."""
        with self._lock:
            if self._is_killed:
                return None, "", ""
            pipe = subprocess.PIPE
            self._process = process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
            limit_process(process.pid, self._memory, self._seconds)
        try:
            output, log = process.communicate(self._given, self._seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            process.communicate()
            return None, "", ""
        return process.returncode, output, log

    def kill(self) -> None:
        """End the process, now or before it begins."""
        with self._lock:
            self._is_killed = True
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
