"""Generation for one base and many adapters: all requests share packed forward passes.

    request --> | queues | --schedule--> | chunks | --execute--> tokens --> text
                scheduler                executor, sampler                 detokenizer

One thread runs forward passes, and only it touches blocks, prefix cache and layers; other threads
leave messages for it. `Engine.generate` runs requests to their ends in the calling thread.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.engine.adapter_registry import AdapterRecord
from afina.engine.config import EngineConfig, block_bytes, blocks_for_lengths
from afina.engine.detokenizer import Detokenizer
from afina.engine.grammar import GrammarCompiler, GrammarMatcher
from afina.engine.kv_cache import KVCache, select_cache
from afina.engine.loop import EngineLoop
from afina.engine.request import (
    AdapterWeight,
    Completion,
    GenerationRequest,
    OnOutput,
    OutputChunk,
    RequestHandle,
    SamplingParams,
)
from afina.engine.sampler import Sampler
from afina.engine.sequence import SequenceState
from afina.errors import AfinaError, BaseError, BusyError, DataError, pluralize
from afina.models.causal_lm import CausalLM


class Engine(EngineLoop):
    """Decoder of a base: each request under its own adapters, all in one packed batch per step."""

    def __init__(
        self,
        base: CausalLM,
        settings: EngineConfig | None = None,
        cache: KVCache | None = None,
    ) -> None:
        """Allocate the pool; see `EngineLoop`."""
        super().__init__(base, settings, cache)
        self._number = 0
        self._grammars: GrammarCompiler | None = None

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
            AdapterWeight(self.registry.add_live(one), one.weight) for one in active.adapters
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
            if isinstance(last.cause, AfinaError):
                raise last.cause
            raise BaseError(
                "generation failed", where=self.base.name, why=last.error
            ) from last.cause
        is_stop = token_ids[-1] in self._stops or token_ids[-1] in stop_token_ids
        return Completion(text.strip(), token_ids, is_stop)

    # ---- any thread

    def start(self) -> None:
        """Start the thread that runs forward passes."""
        self._thread = threading.Thread(target=self._loop, name="afina-engine", daemon=True)
        self._thread.start()

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
        limit = self._check(request)
        names = tuple(part.adapter for part in request.adapters)
        contents = self.registry.acquire(names)
        try:
            sampling, stops = request.sampling, self._stops | request.stop_token_ids
            sampler = Sampler(
                sampling, request.prompt, self.base.vocab_size, self._grammar(request), stops
            )
            text = Detokenizer(self.base.tokenizer, sampling.stop, sampling.skip_special_tokens)
            sequence = SequenceState(0, request, contents, on_output, sampler, text, limit)
            self._check_size(sequence)
            self._enter(sequence)
        except BaseException:
            self.registry.release(names)
            raise
        self._send(lambda: self._begin(sequence))
        return RequestHandle(sequence.seq_id)

    def _enter(self, sequence: SequenceState) -> None:
        """Number a sequence and count it; raise `BusyError` where its client has too many."""
        settings, client = self.settings, sequence.client_id
        with self._wake:
            if self._closing or self.failure is not None:
                raise BusyError("the engine is stopping")
            own, total = self._num_live[client], len(self._live)
            at_limit = own >= settings.max_num_waiting + settings.max_num_seqs
            if at_limit or total >= settings.max_total_waiting + settings.max_num_seqs:
                what = f"{pluralize(own if at_limit else total, 'request')} under way"
                raise BusyError(what, retry_after=self._wait())
            self._number += 1
            self._num_live[client] += 1
            sequence.seq_id = self._number
            self._live[sequence.seq_id] = sequence

    def abort(self, handle: RequestHandle) -> None:
        """Cancel a request that has not finished."""
        self._send(lambda: self._cancel(handle.number))

    def is_live(self, handle: RequestHandle) -> bool:
        """Return whether a request has not finished."""
        return handle.number in self._live

    def embed(
        self,
        prompts: Sequence[tuple[int, ...]],
        adapters: Sequence[AdapterWeight] = (),
        **fields: Any,
    ) -> "Future[list[list[float]]]":
        """Return a vector of length 1 for each prompt: the mean of its last hidden states.

        The prompts are requests as any other, queued together; cancelling the future cancels them.

        Args:
            fields: further fields of `GenerationRequest`, such as `client`.

        Raises:
            DataError: a prompt that is empty or too long for the base.
            AdapterError: an unknown adapter hash.
            BusyError: too many requests wait, or the engine is stopping.
        """
        future: Future[list[list[float]]] = Future()
        vectors: dict[int, list[float]] = {}
        handles: list[RequestHandle] = []

        def collect(number: int, chunk: OutputChunk) -> None:
            vectors[number] = list(chunk.embedding)
            if future.done() or not (chunk.error or len(vectors) == len(prompts)):
                return
            if not future.set_running_or_notify_cancel():
                return
            if chunk.finish_reason == "stop":
                future.set_result([vectors[at] for at in range(len(prompts))])
            else:
                cause = chunk.cause or BusyError(chunk.error or "the engine is stopping")
                future.set_exception(cause)

        def cancel(_: object) -> None:
            for handle in handles:
                self.abort(handle)

        sampling = SamplingParams()
        try:
            for number, prompt in enumerate(prompts):
                request = GenerationRequest(
                    prompt, sampling, tuple(adapters), is_embedding=True, **fields
                )
                handles.append(self.add_request(request, partial(collect, number)))
        except BaseException:
            cancel(None)
            raise
        future.add_done_callback(cancel)
        return future

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes; units are part of the keys."""
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
        longest = self.base.max_positions - (not request.is_embedding)
        if not 0 < len(prompt) <= longest:
            why = f"the base reads from 1 to {longest}"
            why += "" if request.is_embedding else " before its answer"
            raise DataError(f"a prompt of {pluralize(len(prompt), 'token')}", where=where, why=why)
        if min(prompt) < 0 or max(prompt) >= self.base.vocab_size:
            raise DataError(
                f"token {max(prompt)}",
                where=where,
                why=f"the vocabulary ends at {self.base.vocab_size}",
            )
        if request.is_embedding:
            return len(prompt)
        if sampling.max_new_tokens < 1:
            raise DataError(
                f"max_new_tokens is {sampling.max_new_tokens}",
                why="at least one token is generated",
            )
        return min(self.base.max_positions, len(prompt) + sampling.max_new_tokens)

    def _check_size(self, sequence: SequenceState) -> None:
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
