"""Rows of a request to an encoder: tokenized, computed in the engine's batches, counted.

texts --> tokens (a tokenizer thread, within limits) --> engine --> a result per row
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from torch import Tensor

from afina.errors import AdapterError, AfinaError
from afina.io.adapter_metadata import read_metadata
from afina.io.run_record import read_run_record
from afina.models.classifier import Classifier
from afina.objectives.label_tasks import LabelTask
from afina.server.auth import current_principal
from afina.server.errors import APIError, to_api_error
from afina.server.middleware import cancel_on_disconnect
from afina.server.routes.completions import check_token_ids
from afina.server.state import ResolvedModel, ServerState, get_state

Result = TypeVar("Result")
Row = str | list[int] | list[str]


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a request as tokens, and what computes them."""

    chosen: ResolvedModel
    view: Classifier
    rows: list[Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))


async def encode_rows(
    request: Request, chosen: ResolvedModel, rows: Sequence[Row], is_embedding: bool, param: str
) -> EncodedRows:
    """Return rows as tokens for an encoder with the adapters of `chosen`.

    Raises:
        APIError: 400 where the base is no encoder, the adapters give something else, or a row is
            empty, too long or has an unknown token.
    """
    state = get_state(request)
    try:
        view = state.encoder.view(chosen.parts, is_embedding)
    except AdapterError as error:
        raise to_api_error(error, "model") from None
    for row in rows:
        state.text_limit.check(row, param)

    def encode() -> list[Any]:
        return [_encode(state, view, row) for row in rows]

    encoded = await state.run_in_tokenizer_thread(encode)
    limit = view.max_positions
    own = getattr(view, "embedding", None)
    if own is not None and own.max_length is not None:
        limit = min(limit, own.max_length)
    longest = max(map(len, encoded))
    if longest > limit:
        message = f"{param}: a text has {longest:,} tokens; the limit is {limit:,}"
        raise APIError(400, message, param, "context_length_exceeded")
    if min(map(len, encoded)) == 0:
        raise APIError(400, f"{param}: a text has no tokens: at least one is needed", param)
    return EncodedRows(chosen, view, encoded)


def _encode(state: ServerState, view: Classifier, row: Any) -> Any:
    if isinstance(row, str):
        return view.encode(row)
    if isinstance(row[0], str):
        return view.encode(row[0], str(row[1]))
    check_token_ids(state, row, "input")
    return list(row)


async def compute_rows(request: Request, encoded: EncodedRows, is_embedding: bool) -> list[Tensor]:
    """Return the result of each row: its vector `(width,)`, or its scores `(num_outputs,)`."""
    state, chosen = get_state(request), encoded.chosen

    def submit() -> "Future[list[Tensor]]":
        return state.encoder.submit(
            encoded.rows,
            chosen.parts,
            is_embedding=is_embedding,
            client=chosen.client,
            request_id=request.state.log["request"],
        )

    return await wait_for(request, chosen, len(encoded.rows), encoded.num_tokens, submit)


async def wait_for(
    request: Request,
    chosen: ResolvedModel,
    num_rows: int,
    num_tokens: int,
    submit: Callable[[], "Future[Result]"],
) -> Result:
    """Return the engine's result for rows that `submit` queues, within the limits of the key.

    Raises:
        APIError: 400 for what the engine rejects, 429 at a limit, 503 after a timeout.
    """
    state, caller, log = get_state(request), current_principal(request), request.state.log
    log |= {"model": chosen.label, "prompt_tokens": num_tokens}
    with state.limits.running(caller, num_rows):
        try:
            result = await asyncio.wait_for(
                cancel_on_disconnect(request.receive, asyncio.wrap_future(submit())),
                state.settings.request_timeout,
            )
        except AfinaError as error:
            param = "model" if isinstance(error, AdapterError) else "input"
            raise to_api_error(error, param) from None
        except TimeoutError:
            what = f"the request was not complete after {state.settings.request_timeout:.0f} s"
            raise APIError(503, what, code="timeout", retry_after=10.0) from None
    state.limits.spend(caller, num_tokens)
    for name in state.metrics.models(chosen.names):
        state.metrics.read.labels(name).inc(num_tokens)
    return result


def label_task_of(state: ServerState, chosen: ResolvedModel, num_outputs: int) -> LabelTask:
    """Return what the outputs of a classifier are; LABEL_0, ... where nothing records it."""
    base = state.encoder.base
    found = LabelTask(base.task, base.labels)
    entry = state.engine.registry.get(chosen.names[0]) if chosen.names else None
    if entry is not None:
        record = _recorded_labels(Path(entry.folder))
        found = LabelTask(str(record.get("task", "classes")), tuple(record.get("labels", ())))
    if len(found.labels) == num_outputs:
        return found
    names = tuple(f"LABEL_{number}" for number in range(num_outputs))
    return LabelTask("multi-label" if num_outputs == 1 else "classes", names)


def reads_pairs(state: ServerState, chosen: ResolvedModel) -> bool:
    """Return whether an adapter was trained on pairs of texts."""
    entry = state.engine.registry.get(chosen.names[0]) if chosen.names else None
    return entry is not None and bool(_recorded_labels(Path(entry.folder)).get("pairs"))


def _recorded_labels(folder: Path) -> dict[str, Any]:
    """Return what afina.json, or else the run, records of an adapter's labels."""
    data = read_metadata(folder).get("data") or {}
    if "labels" not in data:
        data = read_run_record(folder.parent).get("data") or {}
    return data if isinstance(data, dict) else {}
