"""/v1/files: rows to learn from, uploaded. A file is acknowledged when its bytes and its row are on the disk."""

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
from afina.server.pagination import list_page, paginate
from afina.server.state import ServerState, get_state
from afina.server.store import FileRow, JobRow

router = APIRouter()
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
PURPOSE = "fine-tune"
Owner = Annotated[Principal, Depends(require_key)]
Limit = Annotated[int, Query(ge=1, le=10_000)]


def path_of(state: ServerState, file: FileRow) -> Path:
    """Where a file's bytes are; its ending says how they are to be read."""
    suffix = Path(file.name).suffix.lower()
    return (
        state.settings.state_dir
        / "files"
        / (file.id + (suffix if suffix in SUFFIXES else ".jsonl"))
    )


@router.post("/v1/files")
def upload(
    request: Request, caller: Owner, file: UploadFile, purpose: Annotated[str, Form()]
) -> dict[str, Any]:
    """Keep a file of rows, for jobs to learn from."""
    state = get_state(request)
    if purpose != PURPOSE:
        raise APIError(400, f"files are for {PURPOSE} here", "purpose")
    name = (
        Path((file.filename or "rows.jsonl").replace("\\", "/")).name.replace("\0", "")[:200]
        or "rows.jsonl"
    )
    row = FileRow(
        id=f"file-{uuid.uuid4().hex}", owner=caller.name, name=name, purpose=purpose, bytes=0
    )
    with atomic_file(path_of(state, row)) as beside, beside.open("wb") as stream:
        shutil.copyfileobj(file.file, stream)
        row.bytes = stream.tell()
        if row.bytes > state.settings.max_file_bytes:
            raise APIError(
                413,
                f"the file is longer than {state.settings.max_file_bytes:,} bytes",
                "file",
                "file_too_long",
            )
        stream.flush()
        os.fsync(stream.fileno())
    state.store.add(row)
    return to_response(row)


@router.get("/v1/files")
def list_files(
    request: Request,
    caller: Owner,
    purpose: str | None = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """The caller's files, newest first."""
    if purpose not in (None, PURPOSE):
        return list_page([], limit)
    return paginate(
        get_state(request).store,
        caller,
        FileRow,
        to_response,
        limit,
        after,
        newest_first=order == "desc",
    )


@router.get("/v1/files/{file_id}")
def get_file(file_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """One file."""
    return to_response(find(get_state(request), caller, file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
def content(file_id: str, request: Request, caller: Owner) -> FileResponse:
    """Its bytes."""
    state = get_state(request)
    row = find(state, caller, file_id)
    return FileResponse(
        path_of(state, row), media_type="application/octet-stream", filename=row.name
    )


@router.delete("/v1/files/{file_id}")
def delete(file_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Forget a file that no waiting or running job needs."""
    state = get_state(request)
    row = find(state, caller, file_id)
    needs = (JobRow.training_file == row.id) | (JobRow.validation_file == row.id)
    if jobs := state.store.query(JobRow, needs, JobRow.status.in_(("queued", "running", "paused"))):
        raise APIError(
            409, f"{jobs[0].id} learns from it; cancel the job first", "file_id", "file_in_use"
        )
    with state.store.write() as session:
        session.delete(row)
    path_of(state, row).unlink(missing_ok=True)
    return {"id": row.id, "object": "file", "deleted": True}


def find(state: ServerState, caller: Principal, file: str) -> FileRow:
    """A file that the caller may see; raises 404."""
    row = state.store.get(FileRow, file)
    if row is None or not caller.can_see(row.owner):
        raise not_found("file", file)
    return row


def to_response(row: FileRow) -> dict[str, Any]:
    """A file as OpenAI's API tells of it."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": row.created,
        "filename": row.name,
        "purpose": row.purpose,
        "status": "processed",
    }
