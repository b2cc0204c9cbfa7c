"""Signs of life of a long command: a line at once, and one every few seconds without output."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from afina.io.translation import translate

Duration = Literal["short", "start", "long"]
SILENT_SECONDS = 10.0  # without output, after which a line is printed


class WatchedStream:
    """A text stream that records when it was last written to."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last_write, self.num_writes = stream, time.monotonic(), 0

    def write(self, text: str) -> int:
        """Write to the stream."""
        self.last_write, self.num_writes = time.monotonic(), self.num_writes + 1
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def signs_of_life(command: str, duration: Duration) -> Iterator[None]:
    """Print on standard error that `command` runs, at once and while it prints nothing itself.

    Args:
        command: Name of the command.
        duration: "short": nothing is printed; "start": until the first line of the command itself,
            on a terminal only, because a server's log is JSON lines; "long": until it ends.
    """
    if duration == "short" or (duration == "start" and not sys.stderr.isatty()):
        yield
        return
    stream, watched, done = sys.stderr, WatchedStream(sys.stderr), threading.Event()
    start = time.monotonic()

    def watch() -> None:
        while not done.wait(max(0.1, watched.last_write + SILENT_SECONDS - time.monotonic())):
            if duration == "start" and watched.num_writes:
                return
            if time.monotonic() - watched.last_write >= SILENT_SECONDS:
                seconds = time.monotonic() - start
                text = translate(f"{command} has run for {seconds:.0f} s")
                print(f"afina: {text}", file=stream, flush=True)
                watched.last_write = time.monotonic()

    print(f"afina: {translate(f'{command} started')}", file=stream, flush=True)
    thread = threading.Thread(target=watch, daemon=True)
    sys.stderr = watched  # type: ignore[assignment]
    thread.start()
    try:
        yield
    finally:
        sys.stderr = stream
        done.set()
        thread.join()
