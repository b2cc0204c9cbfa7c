"""Bounds of connections: the time of a request's head, and how many are open.

A connection without a complete head after `HEAD_SECONDS` is closed, whether it is new or was used
before. Beyond `MAX_CONNECTIONS`, the one that has waited longest without a request is closed, so
that idle connections never keep others out.
"""

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
MAX_CONNECTIONS = 2048


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for the head of a request, and a limit of connections."""

    head_seconds, max_connections = HEAD_SECONDS, MAX_CONNECTIONS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_since = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, and close the longest idle one beyond the limit."""
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > self.max_connections:
            others = [c for c in self.connections if isinstance(c, BoundedProtocol)]
            idle = [c for c in others if not c.is_busy and c is not self]
            closed = min(idle, key=lambda c: c._idle_since, default=self)
            closed.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Pass data on; the time of a head begins with its first byte."""
        super().data_received(data)
        if self.is_busy:
            self._cancel_timer()
            self._idle_since = time.monotonic()
        elif self._head_timer is None and not self.transport.is_closing():
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._cancel_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._close_without_head)

    def _cancel_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_without_head(self) -> None:
        self._head_timer = None
        if not self.is_busy:
            self.transport.abort()
