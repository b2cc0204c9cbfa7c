"""/v1/batches: requests of an uploaded file, run while the server has free capacity."""

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field, field_validator

from afina.server.auth import Principal
from afina.server.batches import ENDPOINTS, BatchRunner
from afina.server.errors import APIError, not_found
from afina.server.pagination import paginate
from afina.server.routes.files import Owner, find
from afina.server.schemas import StrictRequest
from afina.server.state import ServerState, get_state
from afina.server.store import BatchRow, now
from afina.server.validation import invalid

router = APIRouter()
Limit = Annotated[int, Query(ge=1, le=100)]
DAY_SECONDS = 86_400


class CreateBatchRequest(StrictRequest):
    """POST /v1/batches."""

    input_file_id: str = Field(max_length=200)
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, Annotated[str, Field(max_length=512)]] = Field({}, max_length=16)
    output_expires_after: dict[str, Any] | None = Field(
        None, description="ignored: outputs are kept until they are deleted"
    )

    @field_validator("endpoint")
    @classmethod
    def _is_known(cls, endpoint: str) -> str:
        if endpoint not in ENDPOINTS:
            raise invalid("", f"endpoint must be one of {', '.join(ENDPOINTS)}")
        return endpoint


@router.post("/v1/batches")
def create(body: CreateBatchRequest, request: Request, caller: Owner) -> dict[str, Any]:
    """Start a batch; its results belong to the caller."""
    state = get_state(request)
    file = find(state, caller, body.input_file_id, "input_file_id")
    if file.purpose != "batch":
        what = f"input_file_id: the purpose of {file.name} is {file.purpose!r}, and not 'batch'"
        raise APIError(400, what, "input_file_id")
    row = BatchRow(
        id=f"batch_{uuid.uuid4().hex}",
        owner=caller.name,
        admin=caller.admin,
        status="validating",
        endpoint=body.endpoint,
        input_file=file.id,
        details=body.metadata,
    )
    state.store.add(row)
    _runner(request).start(row.id)
    return _to_response(request, row)


@router.get("/v1/batches")
def list_batches(
    request: Request, caller: Owner, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """Return the caller's batches, newest first."""
    store = get_state(request).store
    return paginate(store, caller, BatchRow, lambda row: _to_response(request, row), limit, after)


@router.get("/v1/batches/{batch_id}")
def get_batch(batch_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Return one batch."""
    return _to_response(request, _find(get_state(request), caller, batch_id))


@router.post("/v1/batches/{batch_id}/cancel")
def cancel(batch_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Cancel a batch; requests that run are completed, and results so far are kept."""
    state = get_state(request)
    row = _find(state, caller, batch_id)
    if row.status not in ("validating", "in_progress", "cancelling"):
        raise APIError(
            409, f"a batch that is {row.status} cannot be cancelled", code="wrong_status"
        )
    with state.store.write() as session:
        stored = session.get(BatchRow, batch_id)
        if stored is not None and stored.status in ("validating", "in_progress"):
            stored.status = "cancelling"
    return _to_response(request, _find(state, caller, batch_id))


def _runner(request: Request) -> BatchRunner:
    runner: BatchRunner = request.app.state.batches
    return runner


def _find(state: ServerState, caller: Principal, batch: str) -> BatchRow:
    row = state.store.get(BatchRow, batch)
    if row is None or not caller.can_see(row.owner):
        raise not_found("batch", batch)
    return row


def _to_response(request: Request, row: BatchRow) -> dict[str, Any]:
    """Return the response object of a batch, as in OpenAI's API."""
    completed, failed = _runner(request).counts(row)
    ended: dict[str, int | None] = {
        f"{status}_at": None for status in ("completed", "failed", "cancelled")
    }
    if row.finished is not None:
        ended[f"{row.status}_at"] = row.finished
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "errors": {"object": "list", "data": row.errors} if row.errors else None,
        "input_file_id": row.input_file,
        "completion_window": "24h",
        "status": row.status,
        "output_file_id": row.output_file,
        "error_file_id": row.error_file,
        "created_at": row.created,
        "in_progress_at": row.started,
        "expires_at": row.created + DAY_SECONDS,
        "finalizing_at": row.finished,
        "expired_at": None,
        "cancelling_at": now() if row.status == "cancelling" else None,
        **ended,
        "request_counts": {"total": row.total, "completed": completed, "failed": failed},
        "metadata": row.details,
    }
