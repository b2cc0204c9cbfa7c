"""POST /v1/embeddings: a vector per text, by the base or with adapters."""

import base64
import struct
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from afina.server.auth import current_principal
from afina.server.encoder_rows import compute_rows, encode_rows, wait_for
from afina.server.errors import APIError
from afina.server.routes.completions import tokens_of
from afina.server.schemas import EmbeddingRequest, prompts_of
from afina.server.state import ResolvedModel, get_state, note_ignored, requested_model

router = APIRouter()


@router.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, request: Request) -> Response:
    """Return a vector for each input; base64 encodes float32 values, little-endian."""
    state, caller, log = get_state(request), current_principal(request), request.state.log
    note_ignored(request, body)
    size = int(state.model.model.config.get_text_config().hidden_size)
    if body.dimensions not in (None, size):
        what = f"dimensions must be {size}: vectors of this base cannot be shortened"
        raise APIError(400, what, "dimensions")
    log["user"] = body.user
    model, prompts = requested_model(request, body.model), prompts_of(body.input)
    if state.is_encoder:
        chosen = state.resolve_model(caller, model)
        encoded = await encode_rows(request, chosen, prompts, True, "input")
        used = encoded.num_tokens
        vectors = [v.tolist() for v in await compute_rows(request, encoded, True)]
    else:
        chosen, used, vectors = await _by_decoder(request, model, prompts)
    data = [
        {"object": "embedding", "index": n, "embedding": _encoded(v, body)}
        for n, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": used, "total_tokens": used}
    payload = {"object": "list", "data": data, "model": chosen.label, "usage": usage}
    return JSONResponse(
        payload | ({"afina": chosen.choice} if chosen.choice else {}), headers=chosen.headers
    )


async def _by_decoder(
    request: Request, model: str, prompts: list[str | list[int]]
) -> tuple[ResolvedModel, int, list[list[float]]]:
    """Return what `model` is, the tokens of the prompts, and their vectors by a language model."""
    state, caller = get_state(request), current_principal(request)
    tokens = await state.run_in_tokenizer_thread(lambda: tokens_of(state, prompts))
    longest = max(map(len, tokens))
    if longest > state.base.max_positions:
        message = f"an input has {longest:,} tokens; the limit is {state.base.max_positions:,}"
        raise APIError(400, message, "input", "context_length_exceeded")
    chosen = await state.run_in_tokenizer_thread(
        lambda: state.resolve_model(caller, model, tokens[0])
    )

    def submit() -> "Future[list[list[float]]]":
        return state.generator.embed(
            [tuple(one) for one in tokens],
            chosen.parts,
            owner=chosen.owner,
            client=chosen.client,
            cache_salt=chosen.cache_salt,
            request_id=request.state.log["request"],
        )

    used = sum(map(len, tokens))
    return chosen, used, await wait_for(request, chosen, len(tokens), used, submit)


def _encoded(vector: list[float], body: EmbeddingRequest) -> Any:
    if body.encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
