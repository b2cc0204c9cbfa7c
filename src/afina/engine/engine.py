"""Generation for one base and many adapters: all requests share packed forward passes.

    request --> | queues | --schedule--> | chunks | --run--> | logits | --sample--> tokens --> text
                scheduler                runner               sampler                detokenizer

One thread runs forward passes, and only it touches blocks, prefix cache and layers; other threads
leave messages for it. `Engine.generate` runs requests to their ends in the calling thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.engine.adapter_registry import AdapterRecord, AdapterRegistry
from afina.engine.block_pool import BLOCK_SIZE, BlockPool
from afina.engine.config import MIN_BLOCKS, EngineConfig, block_bytes, blocks_for_lengths
from afina.engine.detokenizer import Detokenizer
from afina.engine.grammar import GrammarCompiler, GrammarMatcher
from afina.engine.hot_merge import HotAdapterMerger
from afina.engine.kv_cache import KVCache, select_cache
from afina.engine.memory import MemoryManager
from afina.engine.model_runner import ModelRunner
from afina.engine.request import (
    AdapterWeight,
    Completion,
    FinishReason,
    GenerationRequest,
    Logprob,
    OnOutput,
    OutputChunk,
    RequestHandle,
    SamplingParams,
)
from afina.engine.sampler import Sampler, sample
from afina.engine.scheduler import Scheduler
from afina.engine.sequence import SequenceState
from afina.errors import AfinaError, BaseError, BusyError, DataError, pluralize
from afina.models.causal_lm import CausalLM


class Engine:
    """Decoder of a base: each request under its own adapters, all in one packed batch per step."""

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
        cache = cache or select_cache(base)
        size = block_bytes(base, cache)
        if settings.pool_bytes < MIN_BLOCKS * size:
            raise DataError(
                f"{settings.pool_bytes:,} bytes of memory",
                why=f"a block of {BLOCK_SIZE} tokens takes {size:,} bytes",
            )
        self.registry = AdapterRegistry(base, settings.require_audit)
        layers = cache.layers.values()
        pool = BlockPool(settings.pool_bytes // size, layers, base.dtype, base.device)
        cache.bind(pool)
        self.cache = cache
        self.memory = MemoryManager(base, self.registry, pool, settings.host_cache_bytes)
        self.scheduler = Scheduler(
            self.memory, cache, settings.max_num_batched_tokens, settings.max_num_seqs
        )
        self._runner = ModelRunner(base, cache)
        self._merging = HotAdapterMerger(base, self.memory, settings.merged_weights_bytes)
        self.scheduler.should_defer = self._merging.should_defer
        self._stops = base.stop_token_ids
        self._messages: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._number = 0
        self._grammars: GrammarCompiler | None = None
        self._live: dict[int, SequenceState] = {}
        self._step_error: Exception | None = None  # of the last forward pass that failed
        self.steps = self.generated = self.prompted = self.reused = 0
        self.busy_seconds = 0.0

    # ---- the calling thread

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        active: ActiveAdapters = BASE_ONLY,
        *,
        stop_token_ids: Collection[int] = (),
        owner: str = "",
        on_output: Callable[[int, OutputChunk], None] | None = None,
    ) -> list[Completion]:
        """Return a completion of each prompt; prompt i draws with seed `sampling.seed` + i.

        A completion does not depend on the other prompts, up to rounding. Runs in the calling
        thread, without `start`.

        Args:
            active: adapters attached to the base, used with their present weights.
            stop_token_ids: tokens that end a completion in addition to the base's own.
            owner: cached blocks of different owners are never shared.
            on_output: called with the index of the prompt and its new text.

        Raises:
            DataError: a prompt that is empty or too long for the base.
            SettingsError: a sampling parameter out of its range.
            BaseError: the forward pass failed.
        """
        adapters = tuple(
            AdapterWeight(self.registry.add_live(one), one.weight)
            for one in active.adapters
        )
        requests = [
            GenerationRequest(
                tuple(prompt),
                replace(sampling, seed=sampling.seed + number),
                adapters,
                owner=owner,
                stop_token_ids=frozenset(stop_token_ids),
                streams=on_output is not None,
            )
            for number, prompt in enumerate(prompts)
        ]
        try:
            for number, request in enumerate(requests):
                self._check(request, f"prompt {number + 1}")
            outputs = run_to_completion(self, requests, on_output)
        finally:
            for adapter in adapters:
                self.registry.remove_live(adapter.adapter)
        return [self._completion(*output, stop_token_ids) for output in outputs]

    def _completion(
        self,
        text: str,
        token_ids: list[int],
        last: OutputChunk,
        stop_token_ids: Collection[int],
    ) -> Completion:
        if last.finish_reason == "error":
            if isinstance(self._step_error, AfinaError):
                raise self._step_error
            raise BaseError(
                "generation failed", where=self.base.name, why=last.error
            ) from self._step_error
        is_stop = token_ids[-1] in self._stops or token_ids[-1] in stop_token_ids
        return Completion(text.strip(), token_ids, is_stop)

    # ---- any thread

    def start(self) -> None:
        """Start the thread that runs forward passes."""
        self._thread = threading.Thread(target=self._loop, name="afina-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread that runs forward passes is running."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self, drain: float = 0.0) -> None:
        """Accept no more requests, wait `drain` seconds for running ones, cancel the rest."""
        self._closing = True
        until = time.monotonic() + drain
        while self._live and time.monotonic() < until and self._thread is not None:
            time.sleep(0.01)
        self._send(self._end_all)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._merging.unmerge()
        self.memory.close()

    def add_request(self, request: GenerationRequest, on_output: OnOutput) -> RequestHandle:
        """Queue a request; `on_output` is called in the engine's thread and must return at once.

        Raises:
            DataError: a request that does not fit the base or the pool.
            AdapterError: an unknown adapter hash.
            BusyError: too many requests wait, or the engine is stopping.
        """
        if self._closing:
            raise BusyError("the engine is stopping")
        if len(self._live) >= self.settings.max_num_waiting + self.settings.max_num_seqs:
            raise BusyError(
                f"{pluralize(len(self._live), 'request')} under way", retry_after=self._wait()
            )
        limit = self._check(request)
        names = tuple(part.adapter for part in request.adapters)
        contents = self.registry.acquire(names)
        try:
            sampling, stops = request.sampling, self._stops | request.stop_token_ids
            sampler = Sampler(
                sampling, request.prompt, self.base.vocab_size, self._grammar(request), stops
            )
            text = Detokenizer(self.base.tokenizer, sampling.stop, sampling.skip_special_tokens)
            with self._wake:
                self._number += 1
                number = self._number
            sequence = SequenceState(number, request, contents, on_output, sampler, text, limit)
            self._check_room(sequence)
        except BaseException:
            self.registry.release(names)
            raise
        self._live[number] = sequence
        self._send(lambda: self._begin(sequence))
        return RequestHandle(number)

    def abort(self, handle: RequestHandle) -> None:
        """Cancel a request that has not finished."""
        self._send(lambda: self._cancel(handle.number))

    def is_live(self, handle: RequestHandle) -> bool:
        """Return whether a request has not finished."""
        return handle.number in self._live

    def embed(
        self, prompts: Sequence[tuple[int, ...]], adapters: Sequence[AdapterWeight] = ()
    ) -> "Future[list[list[float]]]":
        """Return a vector of length 1 for each prompt: the mean of its last hidden states."""
        for prompt in prompts:
            if not 0 < len(prompt) <= self.base.max_positions:
                raise DataError(
                    f"a text of {pluralize(len(prompt), 'token')}",
                    why=f"the base reads 1 to {self.base.max_positions}",
                )
        names = tuple(part.adapter for part in adapters)
        contents = self.registry.acquire(names)
        future: Future[list[list[float]]] = Future()

        def work() -> None:
            loaded = []
            try:
                for content in contents:
                    if not self.memory.load(content):
                        raise BusyError("no room for the adapter now")
                    loaded.append(content.hash)
                active = [(part.adapter, part.weight) for part in adapters]
                future.set_result(
                    [self._runner.embed([prompt], active)[0].tolist() for prompt in prompts]
                )
            except Exception as error:  # for the caller; the engine continues
                future.set_exception(error)
            finally:
                for digest in loaded:
                    self.memory.release(digest)
                self.registry.release(names)

        self._send(work)
        return future

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes; bytes and seconds where the key says so."""
        pool = self.memory.pool
        return {
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.num_waiting,
            "blocks": pool.count,
            "blocks_free": pool.num_free_blocks,
            "blocks_cached": self.memory.tree.num_idle_blocks,
            "block_bytes": pool.page_bytes,
            "adapters_registered": len(self.registry.list_adapters()),
            "adapters_loaded": len(self.memory.residents),
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

    def _check(self, request: GenerationRequest, where: str | None = None) -> int:
        """Return the limit of prompt and completion in tokens; `DataError` for a bad prompt."""
        prompt, sampling = request.prompt, request.sampling
        if not 0 < len(prompt) < self.base.max_positions:
            why = f"the base reads from 1 to {self.base.max_positions - 1} before its answer"
            raise DataError(f"a prompt of {pluralize(len(prompt), 'token')}", where=where, why=why)
        if min(prompt) < 0 or max(prompt) >= self.base.vocab_size:
            raise DataError(
                f"token {max(prompt)}",
                where=where,
                why=f"the vocabulary ends at {self.base.vocab_size}",
            )
        if sampling.max_new_tokens < 1:
            raise DataError(
                f"max_new_tokens is {sampling.max_new_tokens}",
                why="at least one token is generated",
            )
        return min(self.base.max_positions, len(prompt) + sampling.max_new_tokens)

    def _check_room(self, sequence: SequenceState) -> None:
        """Raise `DataError` for a request that would not fit into an empty pool."""
        dtype, pool = self.base.dtype, self.memory.pool
        files = [
            content for content in sequence.required_adapters if isinstance(content, AdapterRecord)
        ]
        adapters = sum(pool.blocks_for(content.layout.numbers_in(dtype)) for content in files)
        blocks = -(-sequence.max_total_tokens // self.cache.block_size)
        if adapters + blocks > pool.count:
            why = (
                f"it needs {blocks} blocks for its tokens and {adapters} for its adapters; "
                f"there are {pool.count}"
            )
            raise DataError(
                "a request that does not fit into memory",
                why=why,
                hint="more memory, or fewer tokens",
            )

    def _grammar(self, request: GenerationRequest) -> GrammarMatcher | None:
        """Return the matcher of the request's grammar or JSON schema; None without one."""
        sampling = request.sampling
        schema = sampling.json_schema if sampling.grammar is None else sampling.grammar
        if schema is None:
            return None
        with self._wake:
            self._grammars = self._grammars or GrammarCompiler(self.base.tokenizer)
        return self._grammars.of(schema, self._stops | request.stop_token_ids)

    def _wait(self) -> float:
        """Return the mean seconds per finished request, from 1 to 60."""
        return max(1.0, min(60.0, self.busy_seconds / max(1, self._number - len(self._live))))

    # ---- the engine's own thread

    def _send(self, message: Callable[[], None]) -> None:
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
        """Handle messages and run one forward pass; return False where nothing could run."""
        self.handle_messages()
        for digest in [
            self.registry.unreferenced.pop() for _ in range(len(self.registry.unreferenced))
        ]:
            self.memory.forget(digest)
        chunks = self.scheduler.schedule()
        for sequence, error in self.scheduler.load_failures:
            self._finish(sequence, "error", str(error))
        self.scheduler.load_failures.clear()
        if not chunks:
            if self._live:
                time.sleep(0.0005)  # an adapter is being read from disk
            return False
        begin = time.perf_counter()
        try:
            merged = self._merging.segments(chunks)
            sequences, logits = self._runner.run(chunks, merged)
            broken = ~logits.amax(-1).isfinite() if sequences else logits.new_zeros(0).bool()
            logits = logits.masked_fill(broken[:, None], 0.0) if bool(broken.any()) else logits
            chosen = sample(logits, [s.sampler for s in sequences]) if sequences else []
        except Exception as error:  # of any kind: later requests must still be answered
            self._step_error = error
            for sequence, _ in chunks:
                self._finish(sequence, "error", f"the forward failed: {error}")
            return True
        self._count(chunks)
        self.scheduler.update_after_step(chunks)
        for sequence, logprob, lost in zip(sequences, chosen, broken.tolist(), strict=True):
            if lost:
                why = "the logits are not finite: the adapter's weights are broken, or too large"
                self._finish(sequence, "error", why)
            else:
                self._accept_token(sequence, logprob)
        self.steps += 1
        seconds = time.perf_counter() - begin
        self.busy_seconds += seconds
        self._merging.record_step(chunks, seconds, merged is not None)
        return True

    def handle_messages(self) -> None:
        """Run what other threads have left for this one."""
        while self._messages:
            self._messages.popleft()()

    def _begin(self, sequence: SequenceState) -> None:
        try:
            self.scheduler.add(sequence)
        except Exception as error:
            self._finish(sequence, "error", f"it could not be queued: {error}")

    def _count(self, chunks: Sequence[tuple[SequenceState, int]]) -> None:
        for sequence, count in chunks:
            if sequence.num_completion_tokens == 0 and not sequence.is_counted:
                sequence.is_counted = True
                self.reused += sequence.num_cached_tokens
                for name, _, _ in sequence.adapter_spans:
                    self.registry.record_usage(name, 0, hits=1)
            self.prompted += count if sequence.num_completion_tokens == 0 else 0

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
        chunk = OutputChunk(
            text, (token,), logprobs, finish, num_cached_tokens=sequence.num_cached_tokens
        )
        if finish:
            self._remove(sequence)
        self._emit(sequence, chunk)

    def _finish(
        self, sequence: SequenceState, finish: FinishReason, error: str | None = None
    ) -> None:
        """Finish a sequence before its last token."""
        self._remove(sequence)
        self._emit(
            sequence,
            OutputChunk(
                sequence.end_text(),
                finish_reason=finish,
                error=error,
                num_cached_tokens=sequence.num_cached_tokens,
            ),
        )

    def _remove(self, sequence: SequenceState) -> None:
        if sequence.seq_id not in self._live:
            return
        self.scheduler.abort(sequence)
        for name, _, _ in sequence.adapter_spans:
            self.registry.record_usage(name, sequence.num_completion_tokens)
        self.registry.release(tuple(part.adapter for part in sequence.request.adapters))
        del self._live[sequence.seq_id]
        self.scheduler.forget_idle_clients()

    def _emit(self, sequence: SequenceState, chunk: OutputChunk) -> None:
        try:
            sequence.on_output(chunk)
        except Exception:  # a failing listener ends its own request only
            if sequence.seq_id in self._live:
                self._remove(sequence)

    def _cancel(self, number: int) -> None:
        if number in self._live:
            self._finish(self._live[number], "cancelled")

    def _end_all(self) -> None:
        for sequence in list(self._live.values()):
            self._finish(sequence, "cancelled")


def run_to_completion(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    on_output: Callable[[int, OutputChunk], None] | None = None,
) -> list[tuple[str, list[int], OutputChunk]]:
    """Run requests to their ends in this thread, without `start`.

    Returns:
        Text, tokens and last chunk of each request.
    """
    texts: list[list[str]] = [[] for _ in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    last: list[OutputChunk] = [OutputChunk() for _ in requests]
    failures: list[Exception] = []

    def collect(number: int, chunk: OutputChunk) -> None:
        texts[number].append(chunk.text)
        tokens[number].extend(chunk.token_ids)
        last[number] = chunk
        if on_output is not None:
            try:
                on_output(number, chunk)
            except Exception as error:
                failures.append(error)

    handles: list[RequestHandle] = []
    try:
        for number, request in enumerate(requests):
            handles.append(engine.add_request(request, partial(collect, number)))
        while any(map(engine.is_live, handles)) and not failures:
            engine.step()
    finally:  # an interrupted run leaves nothing in the engine
        for handle in handles:
            engine.abort(handle)
        engine.handle_messages()
    if failures:
        raise failures[0]
    return [("".join(t), ids, chunk) for t, ids, chunk in zip(texts, tokens, last, strict=True)]


def generate_completions(
    base: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    active: ActiveAdapters = BASE_ONLY,
    stop_token_ids: Collection[int] = (),
    on_output: Callable[[int, OutputChunk], None] | None = None,
) -> list[Completion]:
    """Return `Engine.generate` of an engine whose pool has the size that these prompts need."""
    cache = select_cache(base)
    totals = [min(base.max_positions, len(p) + sampling.max_new_tokens) for p in prompts]
    config = EngineConfig(
        pool_bytes=blocks_for_lengths(totals, cache) * block_bytes(base, cache),
        max_num_waiting=len(prompts),
    )
    engine = Engine(base, config, cache)
    try:
        return engine.generate(
            prompts, sampling, active, stop_token_ids=stop_token_ids, on_output=on_output
        )
    finally:
        engine.stop()
