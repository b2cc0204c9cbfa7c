"""POST /v1/completions: go on with texts, or with tokens."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.server.answering import Answers, EventStream, requests_for
from afina.server.asked import CompletionAsked, prompts_of
from afina.server.chat import sse
from afina.server.keys import caller_of
from afina.server.refusal import Refusal
from afina.server.state import State, model_of, state_of
from afina.server.wording import text_logprobs

router = APIRouter()


@router.post("/v1/completions")
async def complete(asked: CompletionAsked, request: Request) -> Response:
    """Go on with each of the prompts, n times."""
    state, caller, log = state_of(request), caller_of(request), request.state.log
    model, prompts = model_of(request, asked.model), prompts_of(asked.prompt)
    tokens = await state.aside(lambda: tokens_of(state, prompts))
    chosen = await state.aside(lambda: state.choose(caller, model, tokens[0]))
    log |= {"user": asked.safety_identifier or asked.user, "stream": asked.stream or None}
    requests = requests_for(state, asked, chosen, tokens, asked.max_tokens, logprobs=asked.logprobs)
    echoes = [_echo(state, prompt) if asked.echo else "" for prompt in prompts for _ in range(asked.n)]
    answers = await Answers.begin(state, caller, chosen, requests, log)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": chosen.label}
    if asked.stream:
        return EventStream(answers, _stream(state, asked, answers, head, echoes, len(prompts)), chosen.headers)
    written = await answers.whole(request.receive)
    choices = [
        {
            "index": number,
            "text": echoes[number] + one.text,
            "logprobs": text_logprobs(state.base, one.logprobs) if asked.logprobs is not None else None,
            "finish_reason": one.finish,
        }
        for number, one in enumerate(written)
    ]
    body = head | {"choices": choices, "usage": answers.usage(len(prompts))}
    return JSONResponse(body | ({"afina": chosen.choice} if chosen.choice else {}), headers=chosen.headers)


async def _stream(
    state: State, asked: CompletionAsked, answers: Answers, head: dict[str, Any], echoes: list[str], prompts: int
) -> AsyncIterator[str]:
    """The chunks of all answers, as they come."""
    counts = asked.stream_options is not None and asked.stream_options.include_usage
    head = head | ({"usage": None} if counts else {})
    offsets = [0] * len(echoes)
    try:
        async for number, event in answers.events():
            text, echoes[number] = echoes[number] + event.text, ""
            told = None
            if asked.logprobs is not None:
                told = text_logprobs(state.base, event.logprobs, offsets[number])
                offsets[number] += sum(map(len, told["tokens"]))
            choice = {"index": number, "text": text, "logprobs": told, "finish_reason": event.finish}
            if text or event.logprobs or event.finish:
                yield sse(head | {"choices": [choice]})
        if counts:
            yield sse(head | {"choices": [], "usage": answers.usage(prompts)})
    except Refusal as refusal:
        yield sse(refusal.body)
    yield "data: [DONE]\n\n"


def tokens_of(state: State, prompts: list[str | list[int]]) -> list[list[int]]:
    """Each prompt as tokens; a text is tokenized as it is, without a chat template."""
    made = [state.renderer.prompt(prompt, raw=True) if isinstance(prompt, str) else prompt for prompt in prompts]
    for tokens in made:
        if not tokens:
            raise Refusal(400, "there is nothing to go on from: the prompt has no token", "prompt")
        if max(tokens) >= state.base.vocabulary:
            raise Refusal(400, f"{max(tokens)} is no token of this base, which has {state.base.vocabulary:,}", "prompt")
    return made


def _echo(state: State, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else state.base.text(prompt)
