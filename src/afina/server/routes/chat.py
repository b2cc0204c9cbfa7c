"""POST /v1/chat/completions."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.server.auth import current_principal
from afina.server.errors import APIError
from afina.server.logprobs import chat_logprobs
from afina.server.schemas import ChatCompletionRequest
from afina.server.state import ServerState, get_state, requested_model
from afina.server.streaming import CompletionStream, EventStream, requests_for

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatCompletionRequest, request: Request) -> Response:
    """Generate the next message of a conversation."""
    state, caller, log = get_state(request), current_principal(request), request.state.log
    model = requested_model(request, body.model)
    messages = [message.plain() for message in body.messages]
    prompt = await state.run_in_tokenizer_thread(lambda: state.renderer.prompt(messages))
    chosen = await state.run_in_tokenizer_thread(lambda: state.resolve_model(caller, model, prompt))
    log |= {"user": body.safety_identifier or body.user, "stream": body.stream or None}
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    requests = requests_for(
        state,
        body,
        chosen,
        [prompt],
        body.max_completion_tokens or body.max_tokens,
        logprobs=logprobs,
        json_schema=body.response_format.json_schema_or_none(),
    )
    answers = await CompletionStream.start(state, caller, chosen, requests, log)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": chosen.label,
    }
    if body.stream:
        return EventStream(answers, _stream(state, body, answers, head), chosen.headers)
    written = await answers.collect(request.receive)
    choices = [
        {
            "index": number,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": chat_logprobs(state.base, one.logprobs) if body.logprobs else None,
            "finish_reason": one.finish,
        }
        for number, one in enumerate(written)
    ]
    payload = head | {"object": "chat.completion", "choices": choices, "usage": answers.usage()}
    return JSONResponse(
        payload | ({"afina": chosen.choice} if chosen.choice else {}), headers=chosen.headers
    )


async def _stream(
    state: ServerState,
    body: ChatCompletionRequest,
    answers: CompletionStream,
    head: dict[str, Any],
) -> AsyncIterator[str]:
    """Yield the chunks: role, text, finish reason, and the usage where it is requested."""
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    head = head | {"object": "chat.completion.chunk"} | ({"usage": None} if has_usage else {})
    if answers.chosen.choice:
        head["afina"] = answers.chosen.choice

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse(head | {"choices": [choice]})

    for number in range(body.n):
        yield chunk(number, {"role": "assistant", "content": "", "refusal": None})
    try:
        async for number, event in answers.events():
            if event.text or event.logprobs:
                logprobs = chat_logprobs(state.base, event.logprobs) if body.logprobs else None
                yield chunk(number, {"content": event.text}, logprobs)
            if event.finish_reason is not None:
                yield chunk(number, {}, finish=event.finish_reason)
        if has_usage:
            yield sse(head | {"choices": [], "usage": answers.usage()})
    except APIError as error:  # the status was sent already: the error is an event
        yield sse(error.body)
    yield "data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
