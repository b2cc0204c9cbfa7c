"""SIGTERM during a run: a batch system, a cluster or torchrun wants the process to end.

The step that runs is finished, a checkpoint is written, and the process exits with 143, so that
`--resume auto` continues at the next start. Outside the training loop there is nothing to save, and
the process exits at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM


class Termination:
    """Whether this process has to end, for the training loop to see between two steps."""

    def __init__(self) -> None:
        self.is_requested = False
        self._is_training = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGTERM within `with`; only the main thread can, others leave it as it is."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            self.is_requested = False

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Leave a request to the loop within `with`; exit at its end if there was one."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
        if self.is_requested:  # during the last step, whose checkpoint is written
            raise SystemExit(EXIT_STATUS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_training:
            raise SystemExit(EXIT_STATUS)
        self.is_requested = True


termination = Termination()
