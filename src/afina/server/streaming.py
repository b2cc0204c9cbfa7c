"""From the engine's thread to a client: n sequences of one request, their events in the order in which they come.

    engine's thread   on_event ---> call_soon_threadsafe ---> queue ---> events()   the server's loop

Whatever happens (an error, a client that is gone, too much time) what is still running is cancelled, once.
"""

import asyncio
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
from afina.errors import AfinaError
from afina.server.auth import Principal
from afina.server.errors import APIError, to_api_error
from afina.server.middleware import cancel_on_disconnect
from afina.server.schemas import SamplingRequest
from afina.server.state import ResolvedModel, ServerState


@dataclass
class CompletionBuffer:
    """One whole answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason = "stop"
    cached: int = 0


class CompletionStream:
    """The running answers of one request."""

    def __init__(
        self,
        state: ServerState,
        caller: Principal,
        chosen: ResolvedModel,
        requests: Sequence[GenerationRequest],
        log: dict[str, Any],
    ) -> None:
        self.state, self.caller, self.chosen, self.requests, self.log = (
            state,
            caller,
            chosen,
            requests,
            log,
        )
        self.written = [CompletionBuffer() for _ in requests]
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, OutputChunk] | None] = asyncio.Queue()
        self._running: dict[int, RequestHandle] = {}
        self._began, self._closed, self._asked, self._stack = (
            time.perf_counter(),
            False,
            0,
            ExitStack(),
        )

    @classmethod
    async def start(
        cls,
        state: ServerState,
        caller: Principal,
        chosen: ResolvedModel,
        requests: Sequence[GenerationRequest],
        log: dict[str, Any],
    ) -> "CompletionStream":
        """Queue all of them, or none; raises `Refusal`."""
        if not state.engine.alive:
            raise APIError(
                503, "the engine has broken; its log says why", code="broken", retry_after=10.0
            )
        answers = cls(state, caller, chosen, requests, log)
        answers._stack.enter_context(state.limits.running(caller))
        submitted = answers._loop.run_in_executor(
            None, answers._submit
        )  # a grammar may take a while
        try:
            await asyncio.shield(submitted)
        except AfinaError as error:
            answers.close()
            raise to_api_error(error) from None
        except BaseException:  # gone while they were being queued: what was, is cancelled
            submitted.add_done_callback(answers._queued_for_nobody)
            raise
        answers._stack.callback(
            answers._loop.call_later(state.settings.request_timeout, answers._too_late).cancel
        )
        return answers

    def _queued_for_nobody(self, submitted: "asyncio.Future[None]") -> None:
        submitted.exception()  # looked at, so that asyncio does not complain of it
        self.close()

    def _submit(self) -> None:
        for number, request in enumerate(self.requests):
            self._asked += len(request.prompt)
            self._running[number] = self.state.engine.add_request(request, self._listener(number))

    def _listener(self, number: int) -> Callable[[OutputChunk], None]:
        def listen(event: OutputChunk) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return listen

    async def events(self) -> AsyncIterator[tuple[int, OutputChunk]]:
        """(which, event) until all have ended; raises `Refusal` where one cannot be ended well."""
        left, first = len(self.requests), True
        while left:
            item = await self._queue.get()
            if item is None:
                raise APIError(
                    503,
                    f"no answer within {self.state.settings.request_timeout:.0f} s",
                    code="timeout",
                    retry_after=10.0,
                )
            number, event = item
            if event.finish_reason == "error":
                raise APIError(500, event.error or "the engine failed")
            if event.finish_reason == "cancelled":
                raise APIError(503, "the server is stopping", code="stopping", retry_after=10.0)
            if first and event.token_ids:
                first = False
                self._seen_first()
            written = self.written[number]
            written.text += event.text
            written.tokens += event.token_ids
            written.logprobs += event.logprobs
            if event.finish_reason is not None:
                written.finish, written.cached = event.finish_reason, event.num_cached_tokens
                left -= 1
                self._running.pop(number, None)
            yield number, event

    async def collect(self, receive: Receive) -> list[CompletionBuffer]:
        """The whole answers, for as long as the client waits; nothing runs on afterwards."""
        try:
            await cancel_on_disconnect(receive, self._all())
        finally:
            self.close()
        return self.written

    async def _all(self) -> None:
        async for _ in self.events():
            pass

    def usage(self, prompts: int = 1) -> dict[str, Any]:
        """Tokens as they are counted for the client; the n answers to one prompt count it once."""
        each = len(self.requests) // prompts
        read = sum(len(request.prompt) for request in self.requests[::each])
        wrote = sum(len(written.tokens) for written in self.written)
        cached = sum(written.cached for written in self.written[::each])
        return {
            "prompt_tokens": read,
            "completion_tokens": wrote,
            "total_tokens": read + wrote,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def close(self) -> None:
        """Cancel what is still running, and write down what was used."""
        if self._closed:
            return
        self._closed = True
        for ticket in self._running.values():
            self.state.engine.abort(ticket)
        self._stack.close()
        metrics, read = self.state.metrics, self._asked
        wrote, cached = (
            sum(n) for n in zip(*((len(w.tokens), w.cached) for w in self.written), strict=True)
        )
        for name in metrics.models(self.chosen.names):
            metrics.read.labels(name).inc(read)
            metrics.cached.labels(name).inc(cached)
            metrics.written.labels(name).inc(wrote)
        metrics.whole.observe(time.perf_counter() - self._began)
        self.state.limits.spend(self.caller, read + wrote)
        self.log |= {
            "model": self.chosen.label,
            "prompt_tokens": read,
            "completion_tokens": wrote,
            "cached_tokens": cached,
        }

    def _seen_first(self) -> None:
        seconds = time.perf_counter() - self._began
        self.log["first_token"] = round(seconds, 4)
        for name in self.state.metrics.models(self.chosen.names):
            self.state.metrics.first.labels(name).observe(seconds)

    def _too_late(self) -> None:
        """Cancel in the engine now, whether somebody still reads or not."""
        for ticket in self._running.values():
            self.state.engine.abort(ticket)
        self._queue.put_nowait(None)


class EventStream(StreamingResponse):
    """Server-sent events, for as long as somebody listens."""

    def __init__(
        self, answers: CompletionStream, content: AsyncIterator[str], headers: dict[str, str]
    ) -> None:
        super().__init__(
            content,
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", **headers},
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client hangs up."""
        try:
            await cancel_on_disconnect(receive, self.stream_response(send))
        finally:
            self._answers.close()


def requests_for(
    state: ServerState,
    body: SamplingRequest,
    chosen: ResolvedModel,
    prompts: Sequence[Sequence[int]],
    most: int | None,
    **more: Any,
) -> list[GenerationRequest]:
    """n requests to the engine for each prompt; raises `Refusal` where prompt and answer do not fit the base's context."""
    context, made = state.base.max_positions, []
    for prompt in prompts:
        if len(prompt) + (most or 1) > context:
            told = f"the prompt's {len(prompt):,} tokens and {most or 1:,} for the answer"
            raise APIError(
                400,
                f"{told} are more than the {context:,} that the base reads",
                "messages",
                "context_length_exceeded",
            )
        limit = most or context - len(prompt)
        sampling: list[SamplingParams] = [
            body.to_sampling_params(limit, state.base.vocab_size, choice, **more)
            for choice in range(body.n)
        ]
        request = GenerationRequest(
            tuple(prompt),
            adapters=chosen.parts,
            owner=chosen.owner,
            stop_token_ids=state.renderer.stop_token_ids,
        )
        made += [replace(request, sampling=one) for one in sampling]
    return made
