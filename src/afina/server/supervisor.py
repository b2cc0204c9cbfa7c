"""`afina serve --supervise`: a process that starts the server again when it ends by itself.

supervisor --settings on standard input--> server
           <--exit status--                           0, or wrong settings: the supervisor ends
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from afina.errors import AfinaError, SettingsError
from afina.server.logs import LOG, set_up_logs
from afina.settings import ServeSettings

FINAL_STATUSES = (0, 2, 130)  # success, wrong settings, interrupted
FIRST_DELAY, MAX_DELAY = 1.0, 30.0  # seconds before another start, doubled each time
STEADY_SECONDS = 60.0  # after so long, the delay is `FIRST_DELAY` again
COMMAND = (sys.executable, "-m", "afina.server.supervisor")


class Supervisor:
    """Starts a command again and again, until it ends with a final status."""

    def __init__(
        self, command: Sequence[str], given: str, first_delay: float = FIRST_DELAY
    ) -> None:
        """Store the command; `given` is the first line of its standard input."""
        self._command, self._given, self._first_delay = command, given, first_delay
        self._process: subprocess.Popen[str] | None = None
        self._ending = threading.Event()

    def run(self) -> int:
        """Return the exit status of the last process."""
        delay = self._first_delay
        while True:
            began, status = time.monotonic(), self._run_once()
            if status in FINAL_STATUSES or self._ending.is_set():
                return status
            delay = self._first_delay if time.monotonic() - began > STEADY_SECONDS else delay
            LOG.error("the server has ended and is started again", extra={"status": status})
            if self._ending.wait(delay):
                return status
            delay = min(MAX_DELAY, 2 * delay)

    def stop(self, *_: Any) -> None:
        """End the process as SIGTERM does; it is not started again."""
        self._ending.set()
        if self._process is not None:
            self._process.terminate()

    def _run_once(self) -> int:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True)
        self._process = process
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(self._given + "\n")
            process.stdin.flush()
        status = process.wait()  # the pipe stays open until then: its end would end the server
        with suppress(BrokenPipeError):
            process.stdin.close()
        return status


def supervise(settings: ServeSettings) -> int:
    """Serve with these settings in another process until SIGTERM or Ctrl-C; return its status."""
    set_up_logs()
    own = settings.model_copy(update={"supervise": False})
    supervisor = Supervisor(COMMAND, own.model_dump_json())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, supervisor.stop)
    return supervisor.run()


def main() -> int:
    """Serve with the settings on standard input, until it is closed."""
    from afina.server.serve import serve

    settings = ServeSettings.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    try:
        serve(settings)
    except AfinaError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    return 0


def _end_with_supervisor() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
