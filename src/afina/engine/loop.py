"""The engine's thread: messages, steps, and the end of each request.

    messages --> schedule --> execute --> tokens, text and errors of each request --> on_output

What one request causes ends that request, and the cause is logged with its id. An error that
belongs to no request ends the thread: its requests end with an error, and `on_failure` is called.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from torch import Tensor

from afina.engine.adapter_registry import AdapterRegistry
from afina.engine.block_pool import BLOCK_SIZE, BlockPool
from afina.engine.config import MIN_BLOCKS, EngineConfig, block_bytes
from afina.engine.executor import Output, StepExecutor
from afina.engine.hot_merge import HotAdapterMerger
from afina.engine.kv_cache import KVCache, select_cache
from afina.engine.memory import MemoryManager
from afina.engine.model_runner import ModelRunner
from afina.engine.request import FinishReason, Logprob, OutputChunk
from afina.engine.scheduler import Scheduler
from afina.engine.sequence import SequenceState
from afina.errors import AdapterError, AfinaError, BusyError, DataError
from afina.models.causal_lm import CausalLM

LOG = logging.getLogger("afina.engine")
MESSAGE_SECONDS = 60.0  # a piece of other work waits for a few steps
IDLE_SECONDS = 0.0005  # between two looks while an adapter is read from disk


Result = TypeVar("Result")


class EngineLoop:
    """Requests of one base and their steps. Only the engine's thread calls, but for `_send`.

    Attributes:
        on_failure: called in the engine's thread with the error that ends it.
        steps: steps so far; `generated`, `prompted` and `reused` count tokens.
        busy_seconds: seconds in steps so far.
    """

    def __init__(
        self,
        base: CausalLM,
        settings: EngineConfig | None = None,
        cache: KVCache | None = None,
    ) -> None:
        """Allocate the pool.

        Args:
            cache: how computed tokens are kept; by default what the family supports.

        Raises:
            DataError: the pool is too small for any request.
        """
        self.base = base
        self.settings = settings = settings or EngineConfig()
        self.cache = cache = cache or select_cache(base)
        size = block_bytes(base, cache)
        if settings.pool_bytes < MIN_BLOCKS * size:
            raise DataError(
                f"{settings.pool_bytes:,} bytes of memory",
                why=f"a block of {BLOCK_SIZE} tokens takes {size:,} bytes",
            )
        self.registry = AdapterRegistry(base, settings.require_audit, settings.reserved_names)
        layers = cache.layers.values()
        pool = BlockPool(settings.pool_bytes // size, layers, base.dtype, base.device)
        cache.bind(pool)
        self.memory = MemoryManager(base, self.registry, pool, settings.host_cache_bytes)
        self.scheduler = Scheduler(
            self.memory, cache, settings.max_num_batched_tokens, settings.max_num_seqs
        )
        self._merging = HotAdapterMerger(base, self.memory, settings.merged_weights_bytes)
        self.scheduler.should_defer = self._merging.should_defer
        self._executor = StepExecutor(ModelRunner(base, cache), self._merging)
        self._stops = base.stop_token_ids
        self._messages: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._live: dict[int, SequenceState] = {}
        self._num_live: Counter[str] = Counter()  # requests that have not finished, by client
        self.failure: BaseException | None = None  # what ended the thread
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self.steps = self.generated = self.prompted = self.reused = 0
        self.busy_seconds = 0.0

    # ---- the thread

    def _send(self, message: Callable[[], None]) -> None:
        """Leave a message for the engine's thread; any thread may call."""
        with self._wake:
            self._messages.append(message)
            self._wake.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread that runs forward passes is running."""
        return self._thread is not None and self._thread.is_alive()

    def run_between_steps(self, work: Callable[[], Result]) -> Result:
        """Return the result of `work`, a short computation, run in the engine's thread.

        Raises:
            BusyError: the engine has stopped, or does not come to it.
        """
        done: Future[Result] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)

        if not self.alive:
            run()
        else:
            self._send(run)
        try:
            return done.result(MESSAGE_SECONDS)
        except TimeoutError:
            done.cancel()
            raise BusyError("the engine does not answer") from None

    def _loop(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._messages and not self._live and not self._closing:
                        self._wake.wait()
                if not self.step() and self._closing and not self._live and not self._messages:
                    return
        except BaseException as error:  # of no request: every later step may be wrong
            self.failure = error
            LOG.critical("the engine has stopped", exc_info=error)
            for sequence in list(self._live.values()):
                self._emit(sequence, OutputChunk(finish_reason="error", error=STOPPED))
            self.on_failure(error)

    def step(self) -> bool:
        """Handle messages and run one forward pass; return False where nothing could run."""
        self.handle_messages()
        for _ in range(len(self.registry.unreferenced)):
            digest = self.registry.unreferenced.pop()
            self.memory.forget(digest)
            self._executor.forget(digest)
        chunks = self.scheduler.schedule()
        for sequence, error in self.scheduler.load_failures:
            self._fail(sequence, error)
        self.scheduler.load_failures.clear()
        if not chunks:
            if self._live:
                time.sleep(IDLE_SECONDS)  # an adapter is being read from disk
            return False
        begin = time.perf_counter()
        result = self._executor.run(chunks)
        computed = [chunk for chunk in chunks if chunk[0].seq_id not in result.failed_forward]
        self._count(computed)
        self.scheduler.update_after_step(computed)
        for sequence, output in result.outputs:
            self._take(sequence, output)
        self.steps += 1
        seconds = time.perf_counter() - begin
        self.busy_seconds += seconds
        self._merging.record_step(computed, seconds, result.is_merged)
        return True

    def handle_messages(self) -> None:
        """Run what other threads have left for this one; an error ends its own message only."""
        while self._messages:
            message = self._messages.popleft()
            try:
                message()
            except Exception:
                LOG.exception("a message to the engine failed")

    # ---- requests

    def _begin(self, sequence: SequenceState) -> None:
        """Queue a new sequence."""
        try:
            self.scheduler.add(sequence)
        except Exception as error:
            self._fail(sequence, error)

    def _count(self, chunks: Sequence[tuple[SequenceState, int]]) -> None:
        for sequence, count in chunks:
            if sequence.num_completion_tokens == 0 and not sequence.is_counted:
                sequence.is_counted = True
                self.reused += sequence.num_cached_tokens
                for name, _, _ in sequence.adapter_spans:
                    self.registry.record_usage(name, 0, hits=1)
            self.prompted += count if sequence.num_completion_tokens == 0 else 0

    def _take(self, sequence: SequenceState, output: Output) -> None:
        """Handle a sequence's output of a step; an error of doing so ends the sequence only."""
        if sequence.seq_id not in self._live:
            return
        try:
            if isinstance(output, Exception):
                self._fail(sequence, output)
            elif isinstance(output, Tensor):
                self._embed(sequence, output)
            else:
                self._accept_token(sequence, output)
        except Exception as error:
            self._fail(sequence, error)

    def _embed(self, sequence: SequenceState, vector: Tensor) -> None:
        if not bool(vector.isfinite().all()):
            why = "the adapter's weights are broken, or too large"
            raise AdapterError("the embedding is not finite", why=why)
        self._remove(sequence)
        values = tuple(vector.tolist())
        self._emit(sequence, OutputChunk(finish_reason="stop", embedding=values))

    def _accept_token(self, sequence: SequenceState, logprob: Logprob) -> None:
        """Append a new token and emit its text, or finish the sequence."""
        token, sampling = logprob.token, sequence.request.sampling
        sequence.token_ids.append(token)
        self.generated += 1
        finish: FinishReason | None = None
        ends = token in self._stops or token in sequence.request.stop_token_ids
        if ends and not sampling.ignore_eos:
            text, finish = sequence.end_text(has_stop_token=True), "stop"
        else:
            text = sequence.add_text(token)
            if sequence.text.stopped or sequence.sampler.is_finished:
                finish = "stop"
            elif len(sequence.token_ids) >= sequence.max_total_tokens:
                finish = "length"
            if finish:
                text += sequence.end_text()
        logprobs = (logprob,) if sampling.logprobs is not None else ()
        is_first = sequence.num_completion_tokens == 1
        chunk = OutputChunk(
            text,
            (token,),
            logprobs,
            finish,
            num_cached_tokens=sequence.num_cached_tokens,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first else (),
        )
        if finish:
            self._remove(sequence)
        self._emit(sequence, chunk)

    def _fail(self, sequence: SequenceState, error: Exception) -> None:
        """End a sequence with an error, whose cause is logged."""
        request = sequence.request.request_id
        LOG.warning(
            "a request failed", exc_info=error, extra={"request": request, "seq": sequence.seq_id}
        )
        known = _one_line(error) if isinstance(error, AfinaError) else _UNKNOWN_CAUSE
        self._end(sequence, "error", known, error)

    def _end(
        self,
        sequence: SequenceState,
        finish: FinishReason,
        error: str | None = None,
        cause: Exception | None = None,
    ) -> None:
        """Finish a sequence before its last token."""
        if sequence.seq_id not in self._live:
            return
        self._remove(sequence)
        try:
            text = sequence.end_text()
        except Exception:  # its detokenizer may be what failed
            text = ""
        cached = sequence.num_cached_tokens
        self._emit(sequence, OutputChunk(text, (), (), finish, error, cause, cached))

    def _remove(self, sequence: SequenceState) -> None:
        if sequence.seq_id not in self._live:
            return
        del self._live[sequence.seq_id]
        with self._wake:
            self._num_live[sequence.client_id] -= 1
            self._num_live += Counter()  # drops clients without requests
        self.scheduler.abort(sequence)
        for name, _, _ in sequence.adapter_spans:
            self.registry.record_usage(name, sequence.num_completion_tokens)
        self.registry.release(tuple(part.adapter for part in sequence.request.adapters))
        self.scheduler.forget_idle_clients()

    def _emit(self, sequence: SequenceState, chunk: OutputChunk) -> None:
        try:
            sequence.on_output(chunk)
        except Exception:  # a failing listener ends its own request only
            self._remove(sequence)

    def _cancel(self, number: int) -> None:
        if number in self._live:
            self._end(self._live[number], "cancelled")

    def _end_all(self) -> None:
        for sequence in list(self._live.values()):
            self._end(sequence, "cancelled")


STOPPED = "the engine has stopped after an error; see the server's log"
_UNKNOWN_CAUSE = "the request could not be computed; see the log of the server"


def _one_line(error: AfinaError) -> str:
    """Return an error without its file and line on this machine."""
    return "; ".join(part for part in (error.what, error.why) if part)
