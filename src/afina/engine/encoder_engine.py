"""Scores and vectors of one encoder with many adapters: rows of all requests share batches.

    request --> | rows, one queue per client | --take--> one forward pass, adapters by row --> rows

One thread runs forward passes, and only it touches the layers. The client that has had the fewest
tokens is next, row by row. A batch that fails is computed again in halves, until the failing row is
alone; only its request ends.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from afina.engine.config import EngineConfig
from afina.engine.encoder_adapters import AttachedAdapters, EncoderRecord, EncoderRegistry
from afina.engine.encoder_batch import (
    EncoderRequest,
    EncoderRow,
    adapters_of,
    check_finite,
    check_sum,
    segments,
)
from afina.engine.request import AdapterWeight
from afina.errors import AdapterError, AfinaError, BaseError, BusyError, DataError, pluralize
from afina.models.classifier import Classifier
from afina.models.encoder import Encoder
from afina.models.encoder_views import EncoderViews

LOG = logging.getLogger("afina.engine")
MAX_BATCH_TOKENS = 4096  # 64 rows of 64 tokens, with padding where the model needs it
LOAD_SECONDS = 60.0  # an adapter that is registered waits so long for the engine's thread


class EncoderEngine:
    """The thread that runs an encoder.

    Attributes:
        on_failure: called in the engine's thread with the error that ends it.
        failure: what ended the thread.
    """

    def __init__(self, views: EncoderViews, settings: EngineConfig | None = None) -> None:
        self.views, self.settings = views, settings or EngineConfig()
        self.registry = EncoderRegistry(
            views,
            self._try_to_load,
            self.settings.require_audit,
            self.settings.reserved_names,
        )
        self._attached = AttachedAdapters(self.registry, self.settings.pool_bytes)
        self._wake = threading.Condition()
        self._queues: dict[str, deque[EncoderRow]] = {}
        self._served: Counter[str] = Counter()  # tokens of each client with rows
        self._num_live: Counter[str] = Counter()  # rows that have not finished, by client
        self._messages: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._live: set[EncoderRequest] = set()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self._num_base_outputs = int(getattr(views.classifier.model.config, "num_labels", 1))
        self.steps = self.rows = self.tokens = 0
        self.busy_seconds = 0.0

    # ---- any thread

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name="afina-engine", daemon=True)
        self._thread.start()

    @property
    def base(self) -> Classifier:
        """The encoder with its classification head."""
        return self.views.classifier

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Accept no more rows, and end the requests that wait."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end_all(BusyError("the engine is stopping"))

    def view(self, adapters: Sequence[AdapterWeight], is_embedding: bool) -> Classifier:
        """Return what computes the rows of a request: a classifier, or an encoder of vectors.

        Raises:
            AdapterError: the adapters, or the base without any, give something else.
        """
        if not adapters:
            if not is_embedding and not self.views.has_head:
                why = "its classification head is not in the published weights"
                what, hint = "the base alone has no classes", "name the adapter of a classifier"
                raise AdapterError(what, why=why, hint=hint)
            return self.views.encoder if is_embedding else self.views.classifier
        views = [self.registry.view_of(part.adapter) for part in adapters]
        if is_embedding != isinstance(views[0], Encoder):
            found, path = ("a classifier", "classify")
            if not is_embedding:
                found, path = "an adapter for embeddings", "embeddings"
            raise AdapterError(f"the adapter is {found}", hint=f"/v1/{path}")
        if any(view is not views[0] and view != views[0] for view in views):
            raise AdapterError("the adapters are of different kinds, and have no sum")
        return views[0]

    def submit(
        self,
        rows: Sequence[Any],
        adapters: Sequence[AdapterWeight] = (),
        *,
        is_embedding: bool,
        client: str = "",
        request_id: str = "",
    ) -> "Future[list[Tensor]]":
        """Queue rows; cancelling the future drops those that have not been computed.

        Args:
            rows: what `encode` of the request's view returns.
            adapters: active together; empty: the base alone.
            is_embedding: vectors `(width,)` instead of the scores `(num_outputs,)`.
            client: client of the fair queue.
            request_id: identifies the request in the log.

        Raises:
            AdapterError: the adapters cannot be active together, or do not give this.
            BusyError: too many rows wait, or the engine is stopping.
            DataError: a row is empty or longer than the base reads.
        """
        view = self.view(adapters, is_embedding)
        for row in rows:
            if not 0 < len(row) <= view.max_positions:
                what = f"a text of {pluralize(len(row), 'token')}"
                raise DataError(what, why=f"the base reads from 1 to {view.max_positions}")
        names = tuple(part.adapter for part in adapters)
        contents = self.registry.acquire(names)
        records = [one for one in contents if isinstance(one, EncoderRecord)]
        request = EncoderRequest(Future(), view, tuple(adapters), records, client, request_id)
        request.num_rows = len(rows)
        try:
            check_sum(request)
            self._enter(request, rows)
        except BaseException:
            self.registry.release(names)
            raise
        request.future.add_done_callback(lambda _: self._leave(request))
        return request.future

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes; seconds where the key names them."""
        return {
            "waiting": sum(map(len, self._queues.values())),
            "adapters_registered": len(self.registry.list_adapters()),
            "adapters_loaded": len(self._attached),
            "adapter_loads": self._attached.loads,
            "adapter_evictions": self._attached.evictions,
            "steps": self.steps,
            "rows": self.rows,
            "busy_seconds": self.busy_seconds,
            "prompt_tokens": self.tokens,
        }

    def _enter(self, request: EncoderRequest, rows: Sequence[Any]) -> None:
        """Queue the rows of a request; raise `BusyError` where its client has too many."""
        client, settings = request.client, self.settings
        with self._wake:
            if self._is_closing or self.failure is not None:
                raise BusyError("the engine is stopping")
            own, total = self._num_live[client] + len(rows), self._num_live.total() + len(rows)
            limits = (max(settings.max_num_waiting, len(rows)), settings.max_total_waiting)
            if own > limits[0] or total > limits[1]:
                raise BusyError(f"{pluralize(own - len(rows), 'row')} under way", retry_after=1.0)
            if client not in self._served:  # what it had before it was idle does not count
                self._served[client] = min(self._served.values(), default=0)
            self._queues.setdefault(client, deque())
            self._num_live[client] += len(rows)
            self._queues[client] += [EncoderRow(request, n, row) for n, row in enumerate(rows)]
            self._live.add(request)
            self._wake.notify()

    def _leave(self, request: EncoderRequest) -> None:
        """Drop what is left of a request that has ended, for whatever reason."""
        with self._wake:
            self._live.discard(request)
            client = request.client
            queue = self._queues.get(client, deque())
            kept = deque(row for row in queue if row.request is not request)
            self._num_live[client] -= request.num_rows
            self._num_live += Counter()  # drops clients without rows
            if kept:
                self._queues[client] = kept
            else:
                self._queues.pop(client, None)
            if client not in self._num_live:
                self._served.pop(client, None)
        for part in request.adapters:
            self.registry.record_usage(part.adapter, 0, hits=1)
        self.registry.release(tuple(part.adapter for part in request.adapters))

    def _try_to_load(self, record: EncoderRecord) -> int:
        """Compute one row with an adapter in the engine's thread; raises `AdapterError`."""
        if not self.alive:
            return self._try(record)
        done: Future[int] = Future()

        def load() -> None:
            try:
                done.set_result(self._try(record))
            except Exception as error:
                done.set_exception(error)

        with self._wake:
            self._messages.append(load)
            self._wake.notify()
        try:
            return done.result(LOAD_SECONDS)
        except TimeoutError:
            raise BusyError("the engine has no time for another adapter") from None

    # ---- the engine's thread

    def _loop(self) -> None:
        try:
            while not self._is_closing:
                with self._wake:
                    while not (self._messages or self._queues or self._is_closing):
                        self._wake.wait()
                self.step()
        except BaseException as error:  # of no request: every later step may be wrong
            self.failure = error
            LOG.critical("the engine has stopped", exc_info=error)
            self._end_all(BaseError("the engine has stopped after an error"))
            self.on_failure(error)

    @torch.inference_mode()
    def step(self) -> None:
        """Handle messages, and compute one batch."""
        for _ in range(len(self.registry.unreferenced)):
            self._attached.forget(self.registry.unreferenced.pop())
        while self._messages:
            self._messages.popleft()()
        batch = self._take()
        if not batch:
            return
        begin = time.perf_counter()
        for rows, results in self._compute(batch):
            for row, result in zip(rows, results, strict=True):
                self._finish(row, result)
        self.steps += 1
        self.busy_seconds += time.perf_counter() - begin

    @torch.inference_mode()
    def _try(self, record: EncoderRecord) -> int:
        """Attach an adapter, and return its number of outputs, from one row."""
        self._attached.load(record, ())
        view = record.view
        own, text = (AdapterWeight(record.hash),), view.encode("a")
        request = EncoderRequest(Future(), view, own, [record], "", "", num_rows=1)
        try:
            found = self._forward([EncoderRow(request, 0, text)])[0]
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            what = "the adapter does not compute on this base"
            raise AdapterError(what, where=record.file, why=why) from error
        check_finite(found)
        return len(found)

    def _take(self) -> list[EncoderRow]:
        """Return rows of one view, in turns of the clients, that fit a batch."""
        batch: list[EncoderRow] = []
        total = longest = 0
        with self._wake:
            able = set(self._queues)
            while able and len(batch) < self.settings.max_num_seqs:
                client = min(able, key=lambda name: self._served[name])
                row = self._queues[client][0]
                length = max(longest, row.length)
                is_packed = row.request.view.packed is not None
                tokens = total + row.length if is_packed else length * (len(batch) + 1)
                if batch and (
                    row.request.view != batch[0].request.view or tokens > MAX_BATCH_TOKENS
                ):
                    able.discard(client)
                    continue
                batch.append(self._queues[client].popleft())
                total, longest = total + row.length, length
                self._served[client] += row.length
                if not self._queues[client]:
                    del self._queues[client]
                    able.discard(client)
        return batch

    def _compute(self, batch: list[EncoderRow]) -> Iterator[tuple[list[EncoderRow], list[Tensor]]]:
        """Yield rows with their results; rows that cannot be computed end their requests."""
        batch = self._load(batch)
        todo = [batch] if batch else []
        while todo:
            part = todo.pop()
            try:
                yield part, self._forward(part)
            except Exception as error:
                if len(part) > 1:
                    part = sorted(part, key=adapters_of)
                    todo += [part[len(part) // 2 :], part[: len(part) // 2]]
                    continue
                self._fail(part[0].request, error)

    def _load(self, batch: list[EncoderRow]) -> list[EncoderRow]:
        """Attach the adapters of a batch; return the rows whose adapters are."""
        needed = {record.hash for row in batch for record in row.request.records}
        failed = set()
        for request in dict.fromkeys(row.request for row in batch):
            try:
                for record in request.records:
                    self._attached.load(record, needed)
            except Exception as error:
                failed.add(request)
                self._fail(request, error)
        return [row for row in batch if row.request not in failed]

    def _forward(self, batch: list[EncoderRow]) -> list[Tensor]:
        """Return the result of each row, on the CPU."""
        view = batch[0].request.view
        with view.forward_context.use(segments(batch)):
            inputs = view.batch([row.content for row in batch])
            compute = view.embed if isinstance(view, Encoder) else view.logits
            return list(compute(inputs).cpu())

    def _finish(self, row: EncoderRow, result: Tensor) -> None:
        request = row.request
        self.rows, self.tokens = self.rows + 1, self.tokens + row.length
        # a batch of scores has the outputs of its largest head
        records = request.records
        if not isinstance(request.view, Encoder):
            result = result[: records[0].num_outputs if records else self._num_base_outputs]
        try:
            check_finite(result)
        except AdapterError as error:
            return self._fail(request, error)
        request.found[row.number] = result.clone()
        if len(request.found) == request.num_rows and request.take():
            request.future.set_result([request.found[n] for n in range(request.num_rows)])

    def _fail(self, request: EncoderRequest, error: Exception) -> None:
        """End a request with an error, whose cause is logged."""
        extra = {"request": request.request_id}
        LOG.warning("a request failed", exc_info=error, extra=extra)
        known = error
        if not isinstance(error, AfinaError):
            known = BaseError("the request could not be computed")
        if request.take():
            request.future.set_exception(known)

    def _end_all(self, error: Exception) -> None:
        for request in list(self._live):
            if request.take():
                request.future.set_exception(error)
