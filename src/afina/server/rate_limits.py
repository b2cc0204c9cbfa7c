"""How much one key may ask at once and a minute; who has asked too much is told when to come back (429).

How much a body may hold is the door's to check, how many may wait is the engine's.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from afina.server.auth import Principal
from afina.server.errors import APIError


@dataclass
class _Use:
    """What a key is doing: its running requests, and the tokens it may still use, as of `seen`."""

    tokens: float
    running: int = 0
    seen: float = 0.0


class RateLimiter:
    """Requests at once and tokens a minute, for each key; None: no limit. Any thread.

    Tokens come back evenly. A request is let in while there are any, and what it used is taken off when it has ended:
    how long an answer will be is not known before.
    """

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self.requests, self.tokens = requests, tokens
        self._uses: dict[str | None, _Use] = {}
        self._lock = threading.Lock()

    @contextmanager
    def running(self, caller: Principal) -> Iterator[None]:
        """Count one request of the caller while the block runs; raises 429."""
        with self._lock:
            use = self._current(caller)
            if self.requests is not None and use.running >= self.requests:
                message = f"{use.running} requests of this key are running; it may have {self.requests} at once"
                raise APIError(429, message, code="too_many_requests", retry_after=1.0)
            if self.tokens is not None and use.tokens <= 0:
                wait = 60.0 * (1.0 - use.tokens) / self.tokens
                message = f"this key has used its {self.tokens:,} tokens a minute"
                raise APIError(429, message, code="rate_limit_exceeded", retry_after=wait)
            use.running += 1
        try:
            yield
        finally:
            with self._lock:
                use.running -= 1

    def spend(self, caller: Principal, tokens: int) -> None:
        """Take off what a request has read and written."""
        with self._lock:
            self._current(caller).tokens -= tokens

    def _current(self, caller: Principal) -> _Use:
        """The use of the caller's key now."""
        use = self._uses.setdefault(
            caller.name, _Use(float(self.tokens or 0), seen=time.monotonic())
        )
        now, most = time.monotonic(), float(self.tokens or 0)
        use.tokens = min(most, use.tokens + (now - use.seen) * most / 60.0)
        use.seen = now
        return use
