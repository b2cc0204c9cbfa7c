"""/v1/files: uploaded training data. The response follows when bytes and row are on the disk."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from afina.io.atomic import atomic_file
from afina.server.auth import Principal, require_key
from afina.server.errors import APIError, not_found
from afina.server.pagination import paginate
from afina.server.state import ServerState, get_state
from afina.server.store import FileRow, JobRow

router = APIRouter()
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
PURPOSES = ("fine-tune", "batch")  # of uploads; "batch_output" is that of results
Owner = Annotated[Principal, Depends(require_key)]
Limit = Annotated[int, Query(ge=1, le=10_000)]


def path_of(state: ServerState, file: FileRow) -> Path:
    """Return the path of a file's bytes; its suffix selects the reader."""
    suffix = Path(file.name).suffix.lower()
    name = file.id + (suffix if suffix in SUFFIXES else ".jsonl")
    return state.settings.state_dir / "files" / name


@router.post("/v1/files")
def upload(
    request: Request, caller: Owner, file: UploadFile, purpose: Annotated[str, Form()]
) -> dict[str, Any]:
    """Store a file of rows for fine-tuning jobs, or of requests for a batch."""
    state = get_state(request)
    if purpose not in PURPOSES:
        what = f"purpose {purpose[:50]!r} is not supported: it must be {' or '.join(PURPOSES)}"
        raise APIError(400, what, "purpose")
    _check_quota(state, caller, file.size or 0)
    path = Path((file.filename or "").replace("\\", "/"))
    name = path.name.replace("\0", "")[:200] or "rows.jsonl"
    row = FileRow(
        id=f"file-{uuid.uuid4().hex}", owner=caller.name, name=name, purpose=purpose, bytes=0
    )
    with atomic_file(path_of(state, row)) as new, new.open("wb") as stream:
        shutil.copyfileobj(file.file, stream)
        row.bytes = stream.tell()
        if row.bytes > state.settings.max_file_bytes:
            what = f"the file is longer than {state.settings.max_file_bytes:,} bytes"
            raise APIError(413, what, "file", "file_too_long")
        stream.flush()
        os.fsync(stream.fileno())
    try:
        state.store.add(row)
    except BaseException:  # no row would ever free the bytes
        path_of(state, row).unlink(missing_ok=True)
        raise
    return to_response(row)


def _check_quota(state: ServerState, caller: Principal, size: int) -> None:
    """Raise `APIError` 413 where a file would exceed what the caller may store."""
    limit, used = state.settings.max_stored_gb_per_key, state.store.stored_bytes(caller.name)
    if used + size > limit * 1e9:
        what = (
            f"this key stores {used:,} bytes of files and adapters, and the file has {size:,}; "
            f"the limit is {limit:g} GB: delete files or models first"
        )
        raise APIError(413, what, "file", "quota_exceeded")


@router.get("/v1/files")
def list_files(
    request: Request,
    caller: Owner,
    purpose: str | None = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """Return the caller's files, newest first."""
    where = [] if purpose is None else [FileRow.purpose == purpose]
    return paginate(
        get_state(request).store,
        caller,
        FileRow,
        to_response,
        limit,
        after,
        *where,
        newest_first=order == "desc",
    )


@router.get("/v1/files/{file_id}")
def get_file(file_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Return one file."""
    return to_response(find(get_state(request), caller, file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
def content(file_id: str, request: Request, caller: Owner) -> FileResponse:
    """Return the bytes of a file."""
    state = get_state(request)
    row = find(state, caller, file_id)
    return FileResponse(
        path_of(state, row), media_type="application/octet-stream", filename=row.name
    )


@router.delete("/v1/files/{file_id}")
def delete(file_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Delete a file that no queued, running or paused job uses."""
    state = get_state(request)
    row = find(state, caller, file_id)
    needs = (JobRow.training_file == row.id) | (JobRow.validation_file == row.id)
    jobs = state.store.query(JobRow, needs, JobRow.status.in_(("queued", "running", "paused")))
    if jobs:
        what = f"the file is used by {jobs[0].id}: cancel the job first"
        raise APIError(409, what, "file_id", "file_in_use")
    with state.store.write() as session:
        session.delete(row)
    path_of(state, row).unlink(missing_ok=True)
    return {"id": row.id, "object": "file", "deleted": True}


def find(state: ServerState, caller: Principal, file: str, param: str | None = None) -> FileRow:
    """Return a file that the caller can see; raise `APIError` 404 where there is none."""
    row = state.store.get(FileRow, file)
    if row is None or not caller.can_see(row.owner):
        raise not_found("file", file, param)
    return row


def to_response(row: FileRow) -> dict[str, Any]:
    """Return the response object of a file, as in OpenAI's API."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": row.created,
        "filename": row.name,
        "purpose": row.purpose,
        "status": "processed",
    }
