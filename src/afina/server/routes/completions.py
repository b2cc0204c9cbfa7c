"""POST /v1/completions: continue texts or token ids."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.server.auth import current_principal
from afina.server.errors import APIError
from afina.server.logprobs import prompt_and_text_logprobs, text_logprobs
from afina.server.schemas import CompletionRequest, prompts_of
from afina.server.state import ServerState, get_state, note_ignored, requested_model
from afina.server.streaming import (
    CompletionBuffer,
    CompletionStream,
    EventStream,
    requests_for,
    sse,
)

router = APIRouter()


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Generate n completions of each prompt."""
    state, caller, log = get_state(request), current_principal(request), request.state.log
    note_ignored(request, body)
    model, prompts = requested_model(request, body.model), prompts_of(body.prompt)
    tokens = await state.run_in_tokenizer_thread(
        lambda: tokens_of(state, prompts, body.add_special_tokens)
    )
    chosen = await state.run_in_tokenizer_thread(
        lambda: state.resolve_model(caller, model, tokens[0])
    )
    log |= {"user": body.safety_identifier or body.user, "stream": body.stream or None}
    requests = requests_for(
        state,
        body,
        chosen,
        tokens,
        None if body.max_tokens == -1 else max(1, body.max_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        json_schema=body.json_schema,
        skip_special_tokens=body.skip_special_tokens,
    )
    echoes = [
        _echo(state, prompt) if body.echo else "" for prompt in prompts for _ in range(body.n)
    ]
    answers = await CompletionStream.start(state, caller, chosen, requests, log)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": chosen.label,
    }
    if body.stream:
        content = _stream(state, body, answers, head, echoes, len(prompts))
        return EventStream(answers, content, chosen.headers)
    written = await answers.collect(request.receive)
    choices = [
        _choice(state, body, number, requests[number].prompt, echoes[number], one)
        for number, one in enumerate(written)
    ]
    payload = head | {"choices": choices, "usage": _usage(body, answers, len(prompts))}
    return JSONResponse(payload | chosen.body, headers=chosen.headers)


def _choice(
    state: ServerState,
    body: CompletionRequest,
    number: int,
    prompt: Sequence[int],
    echo: str,
    one: CompletionBuffer,
) -> dict[str, Any]:
    """Return one choice; with `max_tokens` 0 it is the prompt alone."""
    is_empty = body.max_tokens == 0
    logprobs, generated = None, () if is_empty else one.logprobs
    if body.logprobs is not None and body.echo:
        logprobs = prompt_and_text_logprobs(state.base, prompt, one.prompt_logprobs, generated)
    elif body.logprobs is not None:
        logprobs = text_logprobs(state.base, generated)
    return {
        "index": number,
        "text": echo + ("" if is_empty else one.text),
        "logprobs": logprobs,
        "finish_reason": "length" if is_empty else one.finish,
    }


def _usage(body: CompletionRequest, answers: CompletionStream, prompts: int) -> dict[str, Any]:
    """Return the token counts; a token is generated for `max_tokens` 0 too, and not returned."""
    usage = answers.usage(prompts)
    if body.max_tokens == 0:
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return usage


async def _stream(
    state: ServerState,
    body: CompletionRequest,
    answers: CompletionStream,
    head: dict[str, Any],
    echoes: list[str],
    prompts: int,
) -> AsyncIterator[str]:
    """Yield the chunks of all completions in order of arrival; an echo is in the first ones."""
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    head = head | ({"usage": None} if has_usage else {})
    offsets, is_first = [0] * len(echoes), [True] * len(echoes)
    try:
        async for number, event in answers.events():
            one = CompletionBuffer(event.text, list(event.token_ids), list(event.logprobs))
            one.prompt_logprobs = list(event.prompt_logprobs)
            one.finish = event.finish_reason or one.finish
            if not (is_first[number] or one.text or one.logprobs or event.finish_reason):
                continue
            with_echo = body.model_copy(update={"echo": body.echo and is_first[number]})
            prompt = answers.requests[number].prompt
            echo = echoes[number] if is_first[number] else ""
            choice = _choice(state, with_echo, number, prompt, echo, one)
            is_first[number] = False
            choice["finish_reason"] = choice["finish_reason"] if event.finish_reason else None
            if choice["logprobs"]:
                starts = choice["logprobs"]["text_offset"]
                choice["logprobs"]["text_offset"] = [offsets[number] + at for at in starts]
                offsets[number] += sum(map(len, choice["logprobs"]["tokens"]))
            yield sse(head | {"choices": [choice]})
        if has_usage:
            yield sse(head | {"choices": [], "usage": _usage(body, answers, prompts)})
    except APIError as error:
        yield sse(error.body)
    yield "data: [DONE]\n\n"


def tokens_of(
    state: ServerState, prompts: list[str | list[int]], has_bos: bool = True
) -> list[list[int]]:
    """Return the token ids of each prompt; a text is tokenized without a chat template.

    Args:
        has_bos: whether a text begins with the tokenizer's first (BOS) token, where it has one.
    """
    tokenizer = state.renderer.tokenizer

    def encode(text: str) -> list[int]:
        if has_bos:
            return state.renderer.prompt(text, raw=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for prompt in prompts:
        state.text_limit.check(prompt, "prompt")
    encoded = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    for tokens in encoded:
        if not tokens:
            raise APIError(400, "the prompt has no tokens: at least one is needed", "prompt")
        check_token_ids(state, tokens, "prompt")
    return encoded


def check_token_ids(state: ServerState, tokens: list[int], param: str) -> None:
    """Raise `APIError` 400 for an id beyond the vocabulary of the base."""
    size = int(state.model.model.config.get_text_config().vocab_size)
    if max(tokens, default=0) >= size:
        what = f"token id {max(tokens)} is out of range: the base has {size:,}"
        raise APIError(400, what, param)


def _echo(state: ServerState, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else state.base.decode(prompt)
