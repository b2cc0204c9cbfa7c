"""Rate limits per key: concurrent sequences and tokens per minute (429 with Retry-After).

The middleware limits the size of a body, and the engine the number of waiting requests.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from afina.server.auth import Principal
from afina.server.errors import APIError


@dataclass
class _Usage:
    """Running sequences of a key, and the tokens that it may still use, as of `updated`."""

    tokens: float
    running: int = 0
    updated: float = 0.0


class RateLimiter:
    """Concurrent sequences and tokens per minute of each key; None: no limit. Thread-safe.

    A request with several prompts or choices counts as so many sequences.

    Tokens are refilled evenly. A request is accepted while there are any, and its tokens are
    subtracted when it has ended, since the length of a completion is not known before.
    """

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self.requests, self.tokens = requests, tokens
        self._uses: dict[str | None, _Usage] = {}
        self._lock = threading.Lock()

    @contextmanager
    def running(self, caller: Principal, sequences: int = 1) -> Iterator[None]:
        """Count a request of the caller while the block runs; raise `APIError` 429 at a limit."""
        with self._lock:
            use = self._current(caller)
            if self.requests is not None and use.running + sequences > self.requests:
                message = (
                    f"{use.running} sequences of this key are running, and the request has "
                    f"{sequences}; the limit is {self.requests}"
                )
                raise APIError(429, message, code="too_many_requests", retry_after=1.0)
            if self.tokens is not None and use.tokens <= 0:
                wait = 60.0 * (1.0 - use.tokens) / self.tokens
                message = f"this key has used its {self.tokens:,} tokens per minute"
                raise APIError(429, message, code="rate_limit_exceeded", retry_after=wait)
            use.running += sequences
        try:
            yield
        finally:
            with self._lock:
                use.running -= sequences

    def spend(self, caller: Principal, tokens: int) -> None:
        """Subtract the prompt and completion tokens of a request."""
        with self._lock:
            self._current(caller).tokens -= tokens

    def _current(self, caller: Principal) -> _Usage:
        """Return the usage of the caller's key, refilled up to now."""
        now, limit = time.monotonic(), float(self.tokens or 0)
        use = self._uses.setdefault(caller.name, _Usage(limit, updated=now))
        use.tokens = min(limit, use.tokens + (now - use.updated) * limit / 60.0)
        use.updated = now
        return use
