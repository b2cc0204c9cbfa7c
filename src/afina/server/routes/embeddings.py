"""POST /v1/embeddings: a vector per text, by the base or with adapters."""

import asyncio
import base64
import struct
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.errors import AfinaError
from afina.server.auth import current_principal
from afina.server.errors import APIError, to_api_error
from afina.server.middleware import cancel_on_disconnect
from afina.server.routes.completions import tokens_of
from afina.server.schemas import EmbeddingRequest, prompts_of
from afina.server.state import get_state, note_ignored, requested_model

router = APIRouter()


@router.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, request: Request) -> Response:
    """Return a vector for each input; base64 encodes float32 values, little-endian."""
    state, caller, log = get_state(request), current_principal(request), request.state.log
    note_ignored(request, body)
    size = state.base.model.config.get_text_config().hidden_size
    if body.dimensions not in (None, size):
        what = f"dimensions must be {size}: vectors of this base cannot be shortened"
        raise APIError(400, what, "dimensions")
    prompts = await state.run_in_tokenizer_thread(lambda: tokens_of(state, prompts_of(body.input)))
    longest = max(len(tokens) for tokens in prompts)
    if longest > state.base.max_positions:
        message = f"an input has {longest:,} tokens; the limit is {state.base.max_positions:,}"
        raise APIError(400, message, "input", "context_length_exceeded")
    model = requested_model(request, body.model)
    chosen = await state.run_in_tokenizer_thread(
        lambda: state.resolve_model(caller, model, prompts[0])
    )
    used = sum(map(len, prompts))
    log |= {"user": body.user, "model": chosen.label, "prompt_tokens": used}
    with state.limits.running(caller, len(prompts)):
        try:
            future = state.engine.embed(
                [tuple(tokens) for tokens in prompts],
                chosen.parts,
                owner=chosen.owner,
                client=chosen.client,
                cache_salt=chosen.cache_salt,
                request_id=log["request"],
            )
            vectors = await asyncio.wait_for(
                cancel_on_disconnect(request.receive, asyncio.wrap_future(future)),
                state.settings.request_timeout,
            )
        except AfinaError as error:
            raise to_api_error(error, "input") from None
        except TimeoutError:
            what = f"the request was not complete after {state.settings.request_timeout:.0f} s"
            raise APIError(503, what, code="timeout", retry_after=10.0) from None
    state.limits.spend(caller, used)
    for name in state.metrics.models(chosen.names):
        state.metrics.read.labels(name).inc(used)
    data = [
        {"object": "embedding", "index": n, "embedding": _encoded(v, body)}
        for n, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": used, "total_tokens": used}
    payload = {"object": "list", "data": data, "model": chosen.label, "usage": usage}
    return JSONResponse(
        payload | ({"afina": chosen.choice} if chosen.choice else {}), headers=chosen.headers
    )


def _encoded(vector: list[float], body: EmbeddingRequest) -> Any:
    if body.encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
