"""Completions of one request, from the engine's thread to the client, in order of arrival.

    engine's thread   on_output ---> call_soon_threadsafe ---> queue ---> events()   event loop

After an error, a disconnect or a timeout, sequences that still run are aborted, once.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from afina.engine.request import (
    FinishReason,
    GenerationRequest,
    Logprob,
    OutputChunk,
    RequestHandle,
    SamplingParams,
)
from afina.errors import AfinaError, DataError, SettingsError
from afina.server.auth import Principal
from afina.server.errors import RETRY_SECONDS, APIError, to_api_error
from afina.server.middleware import cancel_on_disconnect
from afina.server.schemas import SamplingRequest
from afina.server.state import ResolvedModel, ServerState

COMMENT_SECONDS = 10.0  # proxies close silent connections after 30 to 60 seconds


@dataclass
class CompletionBuffer:
    """One completion so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason = "stop"
    cached: int = 0


class CompletionStream:
    """The running completions of one request."""

    def __init__(
        self,
        state: ServerState,
        caller: Principal,
        chosen: ResolvedModel,
        requests: Sequence[GenerationRequest],
        log: dict[str, Any],
    ) -> None:
        self.state, self.caller, self.chosen = state, caller, chosen
        self.requests, self.log = requests, log
        self.written = [CompletionBuffer() for _ in requests]
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, OutputChunk] | None] = asyncio.Queue()
        self._running: dict[int, RequestHandle] = {}
        self._began, self._closed, self._num_prompt_tokens = time.perf_counter(), False, 0
        self._stack = ExitStack()

    @classmethod
    async def start(
        cls,
        state: ServerState,
        caller: Principal,
        chosen: ResolvedModel,
        requests: Sequence[GenerationRequest],
        log: dict[str, Any],
    ) -> "CompletionStream":
        """Queue all requests, or none.

        Raises:
            APIError: 429, 503 or what the engine rejects.
        """
        if not state.engine.alive:
            what = "the engine has stopped after an error; see the server's log"
            raise APIError(503, what, code="broken", retry_after=10.0)
        answers = cls(state, caller, chosen, requests, log)
        answers._stack.enter_context(state.limits.running(caller, len(requests)))
        # in a thread: compiling a grammar may take seconds
        submitted = asyncio.ensure_future(state.tokenizer_pool.run(answers._submit, chosen.client))
        try:
            await asyncio.shield(submitted)
        except AfinaError as error:
            answers.close()
            raise to_api_error(error) from None
        except BaseException:  # disconnected while requests were being queued: abort those queued
            submitted.add_done_callback(answers._close_after_disconnect)
            raise
        answers._stack.callback(
            answers._loop.call_later(state.settings.request_timeout, answers._time_out).cancel
        )
        return answers

    def _close_after_disconnect(self, submitted: "asyncio.Task[None]") -> None:
        submitted.exception()  # retrieved, so that asyncio does not log it
        self.close()

    def _submit(self) -> None:
        for number, request in enumerate(self.requests):
            self._num_prompt_tokens += len(request.prompt)
            request = replace(request, request_id=self.log["request"])
            self._running[number] = self.state.generator.add_request(
                request, self._listener(number)
            )

    def _listener(self, number: int) -> Callable[[OutputChunk], None]:
        def listen(event: OutputChunk) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return listen

    async def events(self) -> AsyncIterator[tuple[int, OutputChunk]]:
        """Yield (index of the completion, output chunk) until all have ended.

        Raises:
            APIError: 500 for an error of the engine, 503 after a timeout or while stopping.
        """
        left, first = len(self.requests), True
        while left:
            item = await self._queue.get()
            if item is None:
                seconds = self.state.settings.request_timeout
                what = f"the request was not complete after {seconds:.0f} s"
                raise APIError(503, what, code="timeout", retry_after=10.0)
            number, event = item
            if event.finish_reason == "error":
                raise engine_error(self.chosen.label, event)
            if event.finish_reason == "cancelled":
                raise APIError(503, "the server is stopping", code="stopping", retry_after=10.0)
            if first and event.token_ids:
                first = False
                self._record_first_token()
            event = self._without_stop_token(event)
            written = self.written[number]
            written.text += event.text
            written.tokens += event.token_ids
            written.logprobs += event.logprobs
            written.prompt_logprobs += event.prompt_logprobs
            if event.finish_reason is not None:
                written.finish, written.cached = event.finish_reason, event.num_cached_tokens
                left -= 1
                self._running.pop(number, None)
            yield number, event

    def _without_stop_token(self, event: OutputChunk) -> OutputChunk:
        """Return an output without the log-probability of the stop token, which is no text."""
        request = self.requests[0]
        if not event.logprobs or event.finish_reason != "stop" or request.sampling.ignore_eos:
            return event
        stops = self.state.base.stop_token_ids | request.stop_token_ids
        return replace(event, logprobs=()) if event.token_ids[-1] in stops else event

    async def collect(self, receive: Receive) -> list[CompletionBuffer]:
        """Return the finished completions; abort them when the client disconnects."""
        try:
            await cancel_on_disconnect(receive, self._all())
        finally:
            self.close()
        return self.written

    async def _all(self) -> None:
        async for _ in self.events():
            pass

    def usage(self, prompts: int = 1) -> dict[str, Any]:
        """Return the token counts for the client; a prompt with n completions counts once."""
        each = len(self.requests) // prompts
        prompt_tokens = sum(len(request.prompt) for request in self.requests[::each])
        completion_tokens = sum(len(written.tokens) for written in self.written)
        cached = sum(written.cached for written in self.written[::each])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def close(self) -> None:
        """Abort what still runs, and record the usage; only once."""
        if self._closed:
            return
        self._closed = True
        for ticket in self._running.values():
            self.state.generator.abort(ticket)
        self._stack.close()
        metrics, read = self.state.metrics, self._num_prompt_tokens
        wrote = sum(len(written.tokens) for written in self.written)
        cached = sum(written.cached for written in self.written)
        for name in metrics.models(self.chosen.names):
            metrics.read.labels(name).inc(read)
            metrics.cached.labels(name).inc(cached)
            metrics.written.labels(name).inc(wrote)
        metrics.last.observe(time.perf_counter() - self._began)
        self.state.limits.spend(self.caller, read + wrote)
        self.log |= {
            "model": self.chosen.label,
            "prompt_tokens": read,
            "completion_tokens": wrote,
            "cached_tokens": cached,
        }

    def _record_first_token(self) -> None:
        seconds = time.perf_counter() - self._began
        self.log["first_token"] = round(seconds, 4)
        for name in self.state.metrics.models(self.chosen.names):
            self.state.metrics.first.labels(name).observe(seconds)

    def _time_out(self) -> None:
        """Abort in the engine, whether the client still reads or not."""
        for ticket in self._running.values():
            self.state.generator.abort(ticket)
        self._queue.put_nowait(None)


class EventStream(StreamingResponse):
    """A response of server-sent events, until the client disconnects."""

    def __init__(
        self, answers: CompletionStream, content: AsyncIterator[str], headers: dict[str, str]
    ) -> None:
        super().__init__(
            with_comments(content),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the end, or until the client disconnects."""
        try:
            await cancel_on_disconnect(receive, self.stream_response(send))
        finally:
            self._answers.close()


def engine_error(model: str, event: OutputChunk) -> APIError:
    """Return the API error of a request that ended with an error in the engine.

    What a request itself has caused, such as its schema, is its sender's error (400).
    """
    if isinstance(event.cause, DataError | SettingsError):
        return to_api_error(event.cause)
    what = f"{model}: {event.error or 'the engine failed'}"
    return APIError(500, what, "model", "engine_error", retry_after=RETRY_SECONDS)


async def with_comments(content: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the events, and a comment after each `COMMENT_SECONDS` without one.

    Proxies close a connection that is silent while a long prompt is computed.
    """
    iterator = aiter(content)
    pending = asyncio.ensure_future(_next(iterator))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=COMMENT_SECONDS)
            if not done:
                yield ": waiting\n\n"
                continue
            event = pending.result()
            if event is None:
                return
            yield event
            pending = asyncio.ensure_future(_next(iterator))
    finally:
        pending.cancel()


async def _next(iterator: AsyncIterator[str]) -> str | None:
    return await anext(iterator, None)


def sse(value: dict[str, Any], event: str | None = None) -> str:
    """Return a server-sent event, of type `event` where it is given."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n"


def requests_for(
    state: ServerState,
    body: SamplingRequest,
    chosen: ResolvedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    **more: Any,
) -> list[GenerationRequest]:
    """Return n requests to the engine for each prompt.

    Raises:
        APIError: 400 where a prompt and `max_tokens` exceed the context of the base.
    """
    context, requests = state.base.max_positions, []
    stops = state.formats.of(chosen.names).renderer.stop_token_ids
    for prompt in prompts:
        needed = len(prompt) + (max_tokens or 1)
        if needed > context:
            what = (
                f"the prompt ({len(prompt):,} tokens) and the completion ({max_tokens or 1:,}) "
                f"exceed the context of the base ({context:,} tokens)"
            )
            raise APIError(400, what, "messages", "context_length_exceeded")
        limit = max_tokens or context - len(prompt)
        sampling: list[SamplingParams] = [
            body.to_sampling_params(limit, state.base.vocab_size, choice, **more)
            for choice in range(body.n)
        ]
        request = GenerationRequest(
            tuple(prompt),
            adapters=chosen.parts,
            owner=chosen.owner,
            client=chosen.client,
            cache_salt=chosen.cache_salt,
            stop_token_ids=stops | frozenset(body.stop_token_ids),
        )
        requests += [replace(request, sampling=one) for one in sampling]
    return requests
