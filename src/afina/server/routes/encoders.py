"""POST /v1/classify and /v1/rerank: classes of texts, and documents by relevance to a query."""

import time
import uuid
from typing import Any

import torch
from fastapi import APIRouter, Request
from torch import Tensor

from afina.models.encoder import Encoder
from afina.objectives.label_tasks import LabelTask
from afina.server.auth import current_principal
from afina.server.encoder_rows import compute_rows, encode_rows, label_task_of, reads_pairs
from afina.server.errors import APIError
from afina.server.schemas import ClassificationRequest, RerankRequest, prompts_of
from afina.server.state import get_state, note_ignored, requested_model

router = APIRouter()


@router.post("/v1/classify")
@router.post("/classify", include_in_schema=False)
async def classify(body: ClassificationRequest, request: Request) -> dict[str, Any]:
    """Return the class of each input, and the probabilities of all classes."""
    state, caller = get_state(request), current_principal(request)
    note_ignored(request, body)
    request.state.log["user"] = body.user
    chosen = state.resolve_model(caller, requested_model(request, body.model))
    rows = _rows_of(body.input)
    if reads_pairs(state, chosen) and not all(_is_pair(row) for row in rows):
        what = f'{chosen.label} reads pairs of texts: input must be [["first", "second"], ...]'
        raise APIError(400, what, "input")
    encoded = await encode_rows(request, chosen, rows, False, "input")
    found = await compute_rows(request, encoded, False)
    task = label_task_of(state, chosen, len(found[0]))
    data = [
        {
            "index": number,
            "label": task.answer(scores)[0],
            "probs": (_activated(task, scores) if body.use_activation else scores).tolist(),
            "num_classes": len(scores),
        }
        for number, scores in enumerate(found)
    ]
    used = encoded.num_tokens
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": chosen.label,
        "data": data,
        "usage": {"prompt_tokens": used, "total_tokens": used, "completion_tokens": 0},
    }


@router.post("/v1/rerank")
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(body: RerankRequest, request: Request) -> dict[str, Any]:
    """Return documents by relevance to a query, the most relevant first.

    A classifier with one output reads query and document together; a base or an adapter for
    embeddings compares their vectors.
    """
    state, caller = get_state(request), current_principal(request)
    note_ignored(request, body)
    request.state.log["user"] = body.user
    chosen = state.resolve_model(caller, requested_model(request, body.model))
    documents = body.texts
    is_embedding = _compares_vectors(state.encoder, chosen.parts)
    rows: list[Any] = [body.query, *documents]
    if not is_embedding:
        rows = [[body.query, document] for document in documents]
    encoded = await encode_rows(request, chosen, rows, is_embedding, "documents")
    found = await compute_rows(request, encoded, is_embedding)
    if is_embedding:
        vectors = torch.nn.functional.normalize(torch.stack(found), dim=-1)
        relevance = vectors[1:] @ vectors[0]
    else:
        task = label_task_of(state, chosen, len(found[0]))
        if len(found[0]) != 1:
            what = f"{chosen.label} has {len(found[0])} classes, and relevance is one number"
            raise APIError(
                400, f"{what}: use a reranker, an embedding model, or /v1/classify", "model"
            )
        relevance = torch.stack([_activated(task, scores)[0] for scores in found])
    order = sorted(range(len(documents)), key=lambda n: float(relevance[n]), reverse=True)
    results = [
        {"index": number}
        | ({"document": {"text": documents[number]}} if body.return_documents else {})
        | {"relevance_score": float(relevance[number])}
        for number in order[: body.top_n or None]
    ]
    used = encoded.num_tokens
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": chosen.label,
        "usage": {"prompt_tokens": used, "total_tokens": used},
        "results": results,
    }


def _compares_vectors(engine: Any, parts: Any) -> bool:
    """Return whether vectors are compared: adapters for embeddings, or a base without a head."""
    if not parts:
        return not engine.views.has_head
    return isinstance(engine.registry.view_of(parts[0].adapter), Encoder)


def _rows_of(given: Any) -> list[Any]:
    return given if _is_pair_list(given) else prompts_of(given)


def _is_pair_list(given: Any) -> bool:
    return isinstance(given, list) and all(_is_pair(row) for row in given)


def _is_pair(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and isinstance(row[0], str)


def _activated(task: LabelTask, scores: Tensor) -> Tensor:
    """Return the probabilities of a row's scores; a regression's value as it is."""
    if task.kind == "regression":
        return scores
    return scores.softmax(-1) if task.kind == "classes" else scores.sigmoid()
