"""Run a module of afina in a subprocess, and read its result."""

import json
import subprocess
import sys
from typing import Any

from afina.errors import AfinaError

KILLED = (-9, 137)  # exit statuses of a killed process, by a signal or through a shell


class SubprocessError(AfinaError):
    """A subprocess that failed: `what` is the last line that it printed as an error.

    Attributes:
        is_timeout: Whether it was ended after its time limit.
        is_killed: Whether something else killed it, most likely for lack of memory.
    """

    is_timeout = False
    is_killed = False


def run_in_subprocess(
    module: str, *arguments: str, given: Any = None, timeout: float | None = None
) -> Any:
    """Run `python -m module arguments` and return the JSON value of its last line.

    Args:
        module: Name of the module.
        arguments: Its command-line arguments.
        given: Value that it reads as JSON from standard input.
        timeout: Seconds after which it is ended.

    Raises:
        SubprocessError: It failed, was killed, or took longer than `timeout`.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, input=json.dumps(given), capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        error = SubprocessError(f"{module} took longer than {timeout:.2g} s")
        error.is_timeout = True
        raise error from None
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"{module} printed no error"]
    error = SubprocessError(lines[-1])
    error.is_killed = done.returncode in KILLED
    raise error
