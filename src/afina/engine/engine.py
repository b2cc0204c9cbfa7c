"""The serving engine: one base, any number of adapters, many requests at once.

    submit --> | queues | --plan--> | pieces | --run--> | logits | --choose--> tokens --> on_event
               scheduler            runner                         sampling    text

One thread runs forwards, and it alone touches pages, tree and layers; everybody else only leaves messages for it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from afina.engine.adapter_registry import AdapterRecord, AdapterRegistry
from afina.engine.block_pool import BLOCK_SIZE, BlockPool
from afina.engine.detokenizer import Detokenizer
from afina.engine.grammar import GrammarCompiler, GrammarMatcher
from afina.engine.hot_merge import HotAdapterMerger
from afina.engine.memory import MemoryManager
from afina.engine.model_runner import ModelRunner, kv_layer_shapes
from afina.engine.request import (
    AdapterWeight,
    FinishReason,
    GenerationRequest,
    Logprob,
    OnOutput,
    OutputChunk,
    RequestHandle,
)
from afina.engine.sampler import Sampler, sample
from afina.engine.scheduler import Scheduler
from afina.engine.sequence import SequenceState
from afina.errors import BusyError, DataError, pluralize
from afina.evaluation.generate import stop_token_ids
from afina.models.causal_lm import CausalLM


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine takes: bytes of the pool, tokens of a step, sequences at once, requests that may wait.

    `host_memory`: bytes of adapters kept in the host's memory besides the pool, for a pool on a GPU. `merged_memory`: bytes
    that a second copy of the weights may take, with a hot adapter merged in; 0: never. `require_audit` serves only what
    has a report, and hashes an adapter's numbers again each time they are read.
    """

    pool_bytes: int = 1 << 30
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_num_waiting: int = 1024
    host_cache_bytes: int = 0
    merged_weights_bytes: int = 0
    require_audit: bool = False


class Engine:
    """Answers requests, each under its own adapters, in one run of tokens a step."""

    def __init__(self, base: CausalLM, settings: EngineConfig = EngineConfig()) -> None:
        """Raises `BaseError` for a family whose attention cannot be paged, `DataError` where the memory holds no request."""
        self.base, self.settings = base, settings
        layers = kv_layer_shapes(base)
        size = sum(layer.numel_per_block for layer in layers) * base.dtype.itemsize
        if settings.pool_bytes < 4 * size:
            raise DataError(
                f"{settings.pool_bytes:,} bytes of memory",
                why=f"a page of {BLOCK_SIZE} tokens takes {size:,}",
            )
        self.shelf = AdapterRegistry(base, settings.require_audit)
        pool = BlockPool(settings.pool_bytes // size, layers, base.dtype, base.device)
        self.memory = MemoryManager(base, self.shelf, pool, settings.host_cache_bytes)
        self.scheduler = Scheduler(
            self.memory, settings.max_num_batched_tokens, settings.max_num_seqs
        )
        self._runner = ModelRunner(base, self.memory.pool)
        self._merging = HotAdapterMerger(base, self.memory, settings.merged_weights_bytes)
        self.scheduler.should_defer = self._merging.waits
        self._stops = stop_token_ids(base)
        self._messages: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._number = 0
        self._grammars: GrammarCompiler | None = None
        self._live: dict[int, SequenceState] = {}
        self.steps = self.generated = self.prompted = self.reused = 0
        self.busy_seconds = 0.0

    # ---- any thread

    def start(self) -> None:
        """Begin to answer."""
        self._thread = threading.Thread(target=self._loop, name="afina-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether there is a thread that runs forwards: after `start`, and until it is stopped or broken."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, give those under way `drain` seconds, end the others, and give the layers back."""
        self._closing = True
        until = time.monotonic() + drain
        while self._live and time.monotonic() < until and self._thread is not None:
            time.sleep(0.01)
        self._tell(self._end_all)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._merging.unmerge()
        self.memory.close()

    def add_request(self, request: GenerationRequest, on_event: OnOutput) -> RequestHandle:
        """Queue a request; its events come in the engine's thread, and `on_event` must return at once.

        Raises `DataError` for what can never be answered, `AdapterError` for an unknown hash, `BusyError` when too many wait.
        """
        if self._closing:
            raise BusyError("the engine is stopping")
        if len(self._live) >= self.settings.max_num_waiting + self.settings.max_num_seqs:
            raise BusyError(
                f"{pluralize(len(self._live), 'request')} under way", retry_after=self._wait()
            )
        limit = self._check(request)
        names = tuple(part.adapter for part in request.adapters)
        contents = self.shelf.acquire(names)
        try:
            chooser = Sampler(
                request.sampling, request.prompt, self.base.vocab_size, self._grammar(request)
            )
            text = Detokenizer(self.base.tokenizer, request.sampling.stop)
            with self._wake:
                self._number += 1
                number = self._number
            sequence = SequenceState(number, request, contents, on_event, chooser, text, limit)
            self._check_room(sequence)
        except BaseException:
            self.shelf.release(names)
            raise
        self._live[number] = sequence
        self._tell(lambda: self._begin(sequence))
        return RequestHandle(number)

    def abort(self, ticket: RequestHandle) -> None:
        """End a request, if it is still under way."""
        self._tell(lambda: self._cancel(ticket.number))

    def embed(
        self, prompts: Many[tuple[int, ...]], parts: Many[AdapterWeight] = ()
    ) -> "Future[list[list[float]]]":
        """One vector of length 1 for each prompt: the mean of its last hidden states under the adapters."""
        for prompt in prompts:
            if not 0 < len(prompt) <= self.base.max_positions:
                raise DataError(
                    f"a text of {pluralize(len(prompt), 'token')}",
                    why=f"the base reads 1 to {self.base.max_positions}",
                )
        names = tuple(part.adapter for part in parts)
        contents = self.shelf.acquire(names)
        future: Future[list[list[float]]] = Future()

        def work() -> None:
            brought = []
            try:
                for content in contents:
                    if not self.memory.load(content):
                        raise BusyError("no room for the adapter now")
                    brought.append(content.hash)
                acting = [(part.adapter, part.weight) for part in parts]
                future.set_result(
                    [self._runner.embed([prompt], acting)[0].tolist() for prompt in prompts]
                )
            except Exception as error:  # told to who asked; the engine lives on
                future.set_exception(error)
            finally:
                for digest in brought:
                    self.memory.release(digest)
                self.shelf.release(names)

        self._tell(work)
        return future

    def stats(self) -> dict[str, Any]:
        """What the engine is doing, in numbers."""
        pool = self.memory.pool
        return {
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.num_waiting,
            "pages": pool.count,
            "pages_free": pool.num_free_blocks,
            "pages_cached": self.memory.tree.num_idle_blocks,
            "page_bytes": pool.page_bytes,
            "adapters_registered": len(self.shelf.list_adapters()),
            "adapters_resident": len(self.memory.residents),
            "adapter_loads": self.memory.loads,
            "adapter_evictions": self.memory.evictions,
            "preemptions": self.scheduler.preemptions,
            "steps": self.steps,
            "merged_steps": self._merging.steps,
            "busy_seconds": self.busy_seconds,
            "prompt_tokens": self.prompted,
            "prompt_tokens_cached": self.reused,
            "generated_tokens": self.generated,
        }

    # ---- checks

    def _check(self, request: GenerationRequest) -> int:
        """The most tokens of prompt and answer; raises `DataError` where the prompt leaves no room for one."""
        prompt, sampling = request.prompt, request.sampling
        if not 0 < len(prompt) < self.base.max_positions:
            why = f"the base reads from 1 to {self.base.max_positions - 1} before its answer"
            raise DataError(f"a prompt of {pluralize(len(prompt), 'token')}", why=why)
        if min(prompt) < 0 or max(prompt) >= self.base.vocab_size:
            raise DataError(
                f"token {max(prompt)}", why=f"the vocabulary ends at {self.base.vocab_size}"
            )
        if sampling.max_new_tokens < 1:
            raise DataError(
                f"max_new_tokens is {sampling.max_new_tokens}",
                why="at least one token is generated",
            )
        return min(self.base.max_positions, len(prompt) + sampling.max_new_tokens)

    def _check_room(self, sequence: SequenceState) -> None:
        """Raise `DataError` for a request that would not fit if it were alone."""
        dtype, pool = self.base.dtype, self.memory.pool
        files = [
            content for content in sequence.required_adapters if isinstance(content, AdapterRecord)
        ]
        adapters = sum(pool.blocks_for(content.layout.numbers_in(dtype)) for content in files)
        pages = -(-sequence.max_total_tokens // BLOCK_SIZE)
        if adapters + pages > pool.count:
            why = f"it needs {pages} pages for its tokens and {adapters} for its adapters; there are {pool.count}"
            raise DataError(
                "a request that does not fit into memory",
                why=why,
                hint="more memory, or fewer tokens",
            )

    def _grammar(self, request: GenerationRequest) -> GrammarMatcher | None:
        """What holds the answer to its schema, where it has one."""
        if request.sampling.json_schema is None:
            return None
        with self._wake:
            self._grammars = self._grammars or GrammarCompiler(self.base.tokenizer)
        return self._grammars.of(request.sampling.json_schema, self._stops | request.stop_token_ids)

    def _wait(self) -> float:
        """About how long until a request will have ended, seconds."""
        return max(1.0, min(60.0, self.busy_seconds / max(1, self._number - len(self._live))))

    # ---- the engine's own thread

    def _tell(self, message: Callable[[], None]) -> None:
        with self._wake:
            self._messages.append(message)
            self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._messages and not self._live and not self._closing:
                    self._wake.wait()
            if not self.step() and self._closing and not self._live and not self._messages:
                return

    def step(self) -> bool:
        """Read the messages, run one forward, hand out what it brought; False where there was nothing to run."""
        while self._messages:
            self._messages.popleft()()
        for digest in [self.shelf.unreferenced.pop() for _ in range(len(self.shelf.unreferenced))]:
            self.memory.forget(digest)
        pieces = self.scheduler.schedule()
        for sequence, error in self.scheduler.load_failures:
            self._finish(sequence, "error", str(error))
        self.scheduler.load_failures.clear()
        if not pieces:
            if self._live:
                time.sleep(0.0005)  # an adapter is being read from disk
            return False
        begin = time.perf_counter()
        try:
            merged = self._merging.route(pieces)
            sequences, logits = self._runner.run(pieces, merged)
            broken = ~logits.amax(-1).isfinite() if sequences else logits.new_zeros(0).bool()
            logits = logits.masked_fill(broken[:, None], 0.0) if bool(broken.any()) else logits
            chosen = sample(logits, [s.sampler for s in sequences]) if sequences else []
        except Exception as error:  # whatever it is, those who ask next are answered
            for sequence, _ in pieces:
                self._finish(sequence, "error", f"the forward failed: {error}")
            return True
        self._count(pieces)
        self.scheduler.update_after_step(pieces)
        for sequence, logprob, lost in zip(sequences, chosen, broken.tolist(), strict=True):
            if lost:
                self._finish(
                    sequence,
                    "error",
                    "the logits are not finite: the adapter's numbers are broken, or too large",
                )
            else:
                self._hand_out(sequence, logprob)
        self.steps += 1
        seconds = time.perf_counter() - begin
        self.busy_seconds += seconds
        self._merging.record_step(pieces, seconds, merged is not None)
        return True

    def _begin(self, sequence: SequenceState) -> None:
        try:
            self.scheduler.add(sequence)
        except Exception as error:
            self._finish(sequence, "error", f"it could not be queued: {error}")

    def _count(self, pieces: Many[tuple[SequenceState, int]]) -> None:
        for sequence, count in pieces:
            if sequence.num_completion_tokens == 0 and not sequence.is_counted:
                sequence.is_counted = True
                self.reused += sequence.num_cached_tokens
                for name, _, _ in sequence.adapter_spans:
                    self.shelf.record_usage(name, 0, hits=1)
            self.prompted += count if sequence.num_completion_tokens == 0 else 0

    def _hand_out(self, sequence: SequenceState, logprob: Logprob) -> None:
        """A new token: out goes its text, or the end."""
        token, sampling = logprob.token, sequence.request.sampling
        sequence.token_ids.append(token)
        self.generated += 1
        finish: FinishReason | None = None
        ends = token in self._stops or token in sequence.request.stop_token_ids
        if ends and not sampling.ignore_eos:
            text, finish = sequence.text.end(), "stop"
        else:
            text = sequence.text.add(token)
            if sequence.text.stopped or sequence.sampler.is_finished:
                finish = "stop"
            elif len(sequence.token_ids) >= sequence.max_total_tokens:
                finish = "length"
            if finish:
                text += sequence.text.end()
        told = (logprob,) if sampling.logprobs is not None else ()
        event = OutputChunk(
            text, (token,), told, finish, num_cached_tokens=sequence.num_cached_tokens
        )
        if finish:
            self._leave(sequence)
        self._emit(sequence, event)

    def _finish(
        self, sequence: SequenceState, finish: FinishReason, error: str | None = None
    ) -> None:
        """End a sequence out of turn."""
        self._leave(sequence)
        self._emit(
            sequence,
            OutputChunk(
                sequence.text.end(),
                finish_reason=finish,
                error=error,
                num_cached_tokens=sequence.num_cached_tokens,
            ),
        )

    def _leave(self, sequence: SequenceState) -> None:
        if sequence.seq_id not in self._live:
            return
        self.scheduler.abort(sequence)
        for name, _, _ in sequence.adapter_spans:
            self.shelf.record_usage(name, sequence.num_completion_tokens)
        self.shelf.release(tuple(part.adapter for part in sequence.request.adapters))
        del self._live[sequence.seq_id]
        self.scheduler.forget_idle_clients()

    def _emit(self, sequence: SequenceState, event: OutputChunk) -> None:
        try:
            sequence.on_event(event)
        except Exception:  # a listener that fails harms nobody but itself
            if sequence.seq_id in self._live:
                self._leave(sequence)

    def _cancel(self, number: int) -> None:
        if number in self._live:
            self._finish(self._live[number], "cancelled")

    def _end_all(self) -> None:
        for sequence in list(self._live.values()):
            self._finish(sequence, "cancelled")


def run_to_completion(
    engine: Engine, requests: Many[GenerationRequest]
) -> list[tuple[str, list[int], OutputChunk]]:
    """Run requests to their ends in this thread, without `start`: text, tokens and last event of each."""
    texts: list[list[str]] = [[] for _ in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    last: list[OutputChunk] = [OutputChunk() for _ in requests]

    def listener(at: int) -> OnOutput:
        def listen(event: OutputChunk) -> None:
            texts[at].append(event.text)
            tokens[at].extend(event.token_ids)
            last[at] = event

        return listen

    for at, request in enumerate(requests):
        engine.add_request(request, listener(at))
    while any(event.finish_reason is None for event in last):
        engine.step()
    return [("".join(t), ids, event) for t, ids, event in zip(texts, tokens, last, strict=True)]
