"""Threads for work off the event loop, whose tasks take turns by client.

alice | t | t | t | ...      one thread is always left for other clients:
bob   | t |                  a client has at most all threads but one
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from afina.errors import BusyError

MAX_QUEUED = 1024  # tasks of one client
CLIENT: ContextVar[str] = ContextVar("client", default="")  # of the present request
Result = TypeVar("Result")
Task = tuple[Callable[[], Any], asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class FairThreadPool:
    """Threads that run the tasks of the client with the fewest running ones first.

    The threads are daemons: a task that never ends does not keep the process from ending.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads, self._per_client = threads, max(1, threads - 1)
        self._condition = threading.Condition()
        self._waiting: dict[str, deque[Task]] = {}
        self._running: Counter[str] = Counter()
        self._is_closed = False
        for number in range(threads):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    async def run(self, make: Callable[[], Result], client: str | None = None) -> Result:
        """Return the result of `make`, run in a thread; a cancelled task that waits is dropped.

        Args:
            client: takes turns with other clients; by default the sender of the present request.

        Raises:
            BusyError: too many tasks of the client wait.
        """
        client = CLIENT.get() if client is None else client
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        with self._condition:
            queue = self._waiting.setdefault(client, deque())
            if len(queue) >= MAX_QUEUED or self._is_closed:
                raise BusyError(f"{len(queue):,} requests of this client wait")
            queue.append((make, loop, future))
            self._condition.notify()
        return await future

    def close(self) -> None:
        """Start no further task."""
        with self._condition:
            self._is_closed = True
            self._waiting.clear()
            self._condition.notify_all()

    def _next(self) -> tuple[str, Task] | None:
        """Return the next task and its client; None once the pool is closed."""
        with self._condition:
            while not self._is_closed:
                able = [c for c in self._waiting if self._running[c] < self._per_client]
                if able:
                    client = min(able, key=lambda c: self._running[c])
                    queue = self._waiting.pop(client)
                    task = queue.popleft()
                    if queue:  # behind the other clients
                        self._waiting[client] = queue
                    self._running[client] += 1
                    return client, task
                self._condition.wait()
        return None

    def _work(self) -> None:
        while (found := self._next()) is not None:
            client, (make, loop, future) = found
            result: Any = None
            error: BaseException | None = None
            if not future.cancelled():
                try:
                    result = make()
                except BaseException as caught:  # a panic of a tokenizer is no `Exception`
                    error = caught
            with self._condition:
                self._running[client] -= 1
                self._running += Counter()  # drops clients without tasks
                self._condition.notify_all()
            with suppress(RuntimeError):  # the loop is closed: the result is not needed
                loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
        future.set_exception(error if is_plain else RuntimeError(repr(error)))
