"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.server.auth import current_principal
from afina.server.errors import APIError
from afina.server.logprobs import chat_logprobs
from afina.server.output_parser import Delta
from afina.server.prompts import ChatPrompt
from afina.server.schemas import ChatCompletionRequest, StrictRequest
from afina.server.state import ServerState, get_state, note_ignored, requested_model
from afina.server.streaming import (
    CompletionBuffer,
    CompletionStream,
    EventStream,
    requests_for,
    sse,
)

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatCompletionRequest, request: Request) -> Response:
    """Generate the next message of a conversation."""
    state = get_state(request)
    prompt, answers = await start_chat(body, request)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": answers.chosen.label,
    }
    headers = answers.chosen.headers
    if body.stream:
        return EventStream(answers, _stream(state, body, prompt, answers, head), headers)
    written = await answers.collect(request.receive)
    choices = [_choice(state, body, prompt, number, one) for number, one in enumerate(written)]
    payload = head | {"object": "chat.completion", "choices": choices, "usage": answers.usage()}
    return JSONResponse(payload | answers.chosen.body, headers=headers)


async def start_chat(
    body: ChatCompletionRequest, request: Request, received: StrictRequest | None = None
) -> tuple[ChatPrompt, CompletionStream]:
    """Queue the completions of a chat.

    Args:
        body: The chat.
        request: The request.
        received: The body of the request, where the chat was converted from another kind.

    Raises:
        APIError: what the template, the registry, the limits or the engine reject.
    """
    state, caller, log = get_state(request), current_principal(request), request.state.log
    model = requested_model(request, body.model)
    log |= {"user": body.safety_identifier or body.user, "stream": body.stream or None}
    state.text_limit.check([body.messages, body.tools], "messages")
    chosen, prompt = await state.run_in_tokenizer_thread(
        lambda: state.build_chat(caller, model, body)
    )
    uses_effort = state.formats.of(chosen.names).uses_effort()
    note_ignored(request, received or body, () if uses_effort else ("reasoning_effort",))
    requests = requests_for(
        state,
        body,
        chosen,
        [prompt.tokens],
        body.limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        json_schema=prompt.json_schema,
        grammar=prompt.grammar,
        skip_special_tokens=prompt.skip_special_tokens,
    )
    return prompt, await CompletionStream.start(state, caller, chosen, requests, log)


def call_id(prompt: ChatPrompt) -> str:
    """Return a new id of a call, in the form that the chat template writes."""
    return uuid.uuid4().hex[:9] if prompt.format.has_ids else f"call_{uuid.uuid4().hex[:24]}"


def finish_reason(finish: str, num_calls: int) -> str:
    """Return OpenAI's finish reason of an answer with `num_calls` calls."""
    return "tool_calls" if num_calls and finish == "stop" else finish


def message_of(prompt: ChatPrompt, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return the message of an answer's pieces."""
    texts = {
        kind: "".join(delta.text for delta in deltas if delta.kind == kind)
        for kind in ("reasoning", "content")
    }
    names = [delta.text for delta in deltas if delta.kind == "call"]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": texts["content"] if texts["content"] or not names else None,
        "refusal": None,
    }
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    if names:
        arguments = [
            "".join(d.text for d in deltas if d.kind == "arguments" and d.index == n)
            for n in range(len(names))
        ]
        message["tool_calls"] = [
            {
                "id": call_id(prompt),
                "type": "function",
                "function": {"name": name, "arguments": given},
            }
            for name, given in zip(names, arguments, strict=True)
        ]
    return message


def _choice(
    state: ServerState,
    body: ChatCompletionRequest,
    prompt: ChatPrompt,
    number: int,
    one: CompletionBuffer,
) -> dict[str, Any]:
    parser = prompt.parser()
    message = message_of(prompt, [*parser.add(one.text), *parser.end()])
    return {
        "index": number,
        "message": message,
        "logprobs": chat_logprobs(state.base, one.logprobs) if body.logprobs else None,
        "finish_reason": finish_reason(one.finish, parser.num_calls),
    }


async def _stream(
    state: ServerState,
    body: ChatCompletionRequest,
    prompt: ChatPrompt,
    answers: CompletionStream,
    head: dict[str, Any],
) -> AsyncIterator[str]:
    """Yield the chunks: role, pieces, finish reason, and the usage where it is requested."""
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    head = head | {"object": "chat.completion.chunk"} | ({"usage": None} if has_usage else {})
    head |= answers.chosen.body
    parsers = [prompt.parser() for _ in range(body.n)]

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse(head | {"choices": [choice]})

    for number in range(body.n):
        yield chunk(number, {"role": "assistant", "content": "", "refusal": None})
    try:
        async for number, event in answers.events():
            parser = parsers[number]
            deltas = parser.add(event.text)
            if event.finish_reason is not None:
                deltas += parser.end()
            logprobs = None
            if body.logprobs and event.logprobs:
                logprobs = chat_logprobs(state.base, event.logprobs)
                deltas = deltas or [Delta("content", "")]
            for delta in deltas:
                yield chunk(number, _delta(prompt, delta), logprobs)
                logprobs = None  # those of one step are sent once
            if event.finish_reason is not None:
                finish = finish_reason(event.finish_reason, parser.num_calls)
                yield chunk(number, {}, finish=finish)
        if has_usage:
            yield sse(head | {"choices": [], "usage": answers.usage()})
    except APIError as error:  # the status was sent already: the error is an event
        yield sse(error.body)
    yield "data: [DONE]\n\n"


def _delta(prompt: ChatPrompt, delta: Delta) -> dict[str, Any]:
    """Return a piece in OpenAI's form."""
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    call: dict[str, Any] = {"index": delta.index}
    if delta.kind == "call":
        function = {"name": delta.text, "arguments": ""}
        call |= {"id": call_id(prompt), "type": "function", "function": function}
    else:
        call["function"] = {"arguments": delta.text}
    return {"tool_calls": [call]}
