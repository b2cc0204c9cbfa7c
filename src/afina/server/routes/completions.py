"""POST /v1/completions: continue texts or token ids."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.server.auth import current_principal
from afina.server.errors import APIError
from afina.server.logprobs import text_logprobs
from afina.server.schemas import CompletionRequest, prompts_of
from afina.server.state import ServerState, get_state, note_ignored, requested_model
from afina.server.streaming import CompletionStream, EventStream, requests_for, sse

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
        None if body.max_tokens == -1 else body.max_tokens,
        logprobs=body.logprobs,
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
        return EventStream(
            answers, _stream(state, body, answers, head, echoes, len(prompts)), chosen.headers
        )
    written = await answers.collect(request.receive)
    choices = [
        {
            "index": number,
            "text": echoes[number] + one.text,
            "logprobs": None if body.logprobs is None else text_logprobs(state.base, one.logprobs),
            "finish_reason": one.finish,
        }
        for number, one in enumerate(written)
    ]
    payload = head | {"choices": choices, "usage": answers.usage(len(prompts))}
    return JSONResponse(
        payload | ({"afina": chosen.choice} if chosen.choice else {}), headers=chosen.headers
    )


async def _stream(
    state: ServerState,
    body: CompletionRequest,
    answers: CompletionStream,
    head: dict[str, Any],
    echoes: list[str],
    prompts: int,
) -> AsyncIterator[str]:
    """Yield the chunks of all completions in order of arrival."""
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    head = head | ({"usage": None} if has_usage else {})
    offsets = [0] * len(echoes)
    try:
        async for number, event in answers.events():
            text, echoes[number] = echoes[number] + event.text, ""
            logprobs = None
            if body.logprobs is not None:
                logprobs = text_logprobs(state.base, event.logprobs, offsets[number])
                offsets[number] += sum(map(len, logprobs["tokens"]))
            choice = {
                "index": number,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": event.finish_reason,
            }
            if text or event.logprobs or event.finish_reason:
                yield sse(head | {"choices": [choice]})
        if has_usage:
            yield sse(head | {"choices": [], "usage": answers.usage(prompts)})
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
    if max(tokens, default=0) >= state.base.vocab_size:
        what = f"token id {max(tokens)} is out of range: the base has {state.base.vocab_size:,}"
        raise APIError(400, what, param)


def _echo(state: ServerState, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else state.base.decode(prompt)
