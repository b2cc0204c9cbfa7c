"""POST /v1/responses: the stateless part of OpenAI's newer API, on the engine of the chats."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.engine.request import OutputChunk
from afina.server.errors import APIError
from afina.server.logprobs import chat_logprobs
from afina.server.output_parser import OutputParser
from afina.server.prompts import ChatPrompt
from afina.server.response_events import Event, ResponseBuilder
from afina.server.response_input import ResponseRequest
from afina.server.routes.chat import start_chat
from afina.server.state import ServerState, get_state
from afina.server.streaming import CompletionStream, EventStream, sse

router = APIRouter()


@router.post("/v1/responses")
async def respond(body: ResponseRequest, request: Request) -> Response:
    """Generate the output items that follow the input items."""
    state = get_state(request)
    prompt, answers = await start_chat(body.chat(), request, body)
    builder = ResponseBuilder(body, answers.chosen.label)
    builder.response |= answers.chosen.body
    headers = answers.chosen.headers
    if body.stream:
        return EventStream(answers, _stream(state, body, prompt, answers, builder), headers)
    (written,) = await answers.collect(request.receive)
    parser, logprobs = prompt.parser(), _logprobs(state, body, written.logprobs)
    for piece in (written.text, None):
        deltas = parser.end() if piece is None else parser.add(piece)
        list(builder.add(deltas, logprobs if piece is not None else [], 0))
    list(builder.end(written.finish, answers.usage()))
    return JSONResponse(builder.response, headers=headers)


async def _stream(
    state: ServerState,
    body: ResponseRequest,
    prompt: ChatPrompt,
    answers: CompletionStream,
    builder: ResponseBuilder,
) -> AsyncIterator[str]:
    """Yield the events of a response."""
    parser = prompt.parser()
    for event in builder.begin():
        yield _sse(event)
    try:
        async for _, output in answers.events():
            for event in _events(state, body, builder, parser, output):
                yield _sse(event)
        for event in builder.end(answers.written[0].finish, answers.usage()):
            yield _sse(event)
    except APIError as error:  # the status was sent already: the error is an event
        for event in builder.fail(error.message, error.code):
            yield _sse(event)


def _events(
    state: ServerState,
    body: ResponseRequest,
    builder: ResponseBuilder,
    parser: OutputParser,
    output: OutputChunk,
) -> list[Event]:
    deltas = parser.add(output.text)
    if output.finish_reason is not None:
        deltas += parser.end()
    logprobs = _logprobs(state, body, output.logprobs)
    return list(builder.add(deltas, logprobs, len(output.token_ids)))


def _logprobs(state: ServerState, body: ResponseRequest, logprobs: Any) -> list[Any]:
    if not body.has_logprobs or not logprobs:
        return []
    content: list[Any] = chat_logprobs(state.base, logprobs)["content"]
    return content


def _sse(event: Event) -> str:
    return sse(event, event["type"])
