"""/v1/models, and for administrators /v1/adapters: load, replace, rename and unload adapters."""

import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints

from afina.engine.request import RegisteredAdapter
from afina.errors import AdapterError, AuditError
from afina.io.adapter_folder import adapter_folder
from afina.server.auth import Principal, current_principal, require_admin
from afina.server.errors import APIError, not_found, to_api_error
from afina.server.schemas import StrictRequest
from afina.server.state import AUTO, ServerState, get_state
from afina.server.store import AdapterRow

router = APIRouter()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,199}")
STARTED = int(time.time())  # `created` of the base and of adapters given at the start
Admin = Annotated[Principal, Depends(require_admin)]
Folder = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class LoadAdapterRequest(StrictRequest):
    """POST /v1/adapters: a folder, relative to one of the server's adapter folders."""

    name: str
    folder: Folder
    owner: str | None = Field(
        None, max_length=200, description="name of the owner's key; public by default"
    )


class ReplaceAdapterRequest(StrictRequest):
    """PUT /v1/adapters/NAME: the new folder of an adapter."""

    folder: Folder


class RenameAdapterRequest(StrictRequest):
    """POST /v1/adapters/NAME/rename: the new name of an adapter."""

    name: str


def check_name(state: ServerState, name: str, param: str = "name") -> None:
    """Raise `APIError` 400 for a name that no request could use."""
    if not NAME.fullmatch(name) or name in (AUTO, state.base_name):
        what = f"{param} must be 1 to 200 letters, digits and _ . : @ -"
        raise APIError(400, f"{what}, and not {AUTO!r} or the name of the base", param)


def resolve_adapter_path(state: ServerState, folder: str, param: str = "folder") -> Path:
    """Return the path of `folder` below one of the server's adapter folders.

    Raises:
        APIError: 400 where the folder, or a link in it, leads out of the adapter folders.
    """
    path = Path(folder)
    if path.is_absolute() or ".." in path.parts or "\0" in folder or "\\" in folder:
        what = f"{param} must be relative to the server's adapter folders, without .. in it"
        raise APIError(400, what, param)
    for parent in [*state.settings.adapters, state.settings.state_dir / "adapters"]:
        root = parent.expanduser().resolve()
        found = (root / path).resolve()
        if not found.is_dir():
            continue
        if not all(file.resolve().is_relative_to(root) for file in (found, *found.rglob("*"))):
            what = f"{param}: {folder} contains a link out of the adapter folder"
            raise APIError(400, what, param)
        return found
    what = f"{param}: {folder!r} does not exist below the server's adapter folders"
    raise APIError(400, what, param)


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """Return the base and the adapters that the caller can see."""
    state, caller = get_state(request), current_principal(request)
    base = {
        "id": state.base_name,
        "object": "model",
        "created": STARTED,
        "owned_by": "afina",
        "parent": None,
    }
    created = {row.name: row.created for row in state.store.query(AdapterRow)}
    adapters = [
        {
            "id": entry.name,
            "object": "model",
            "created": created.get(entry.name, STARTED),
            "owned_by": entry.owner or "afina",
            "parent": state.base_name,
        }
        for entry in state.visible_adapters(caller)
    ]
    return {"object": "list", "data": [base, *adapters]}


@router.get("/v1/models/{model:path}")
def get_model(model: str, request: Request) -> dict[str, Any]:
    """Return one model."""
    for one in list_models(request)["data"]:
        if one["id"] == model:
            return dict(one)
    raise not_found("model", model)


@router.delete("/v1/models/{model:path}")
def delete_model(model: str, request: Request) -> dict[str, Any]:
    """Unregister a fine-tuned model; for its owner and administrators."""
    state, caller = get_state(request), current_principal(request)
    entry = state.visible_adapter(caller, model)
    if entry is None:
        raise not_found("model", model)
    if not caller.admin and (caller.name is None or entry.owner != caller.name):
        raise APIError(
            403 if caller.name else 401, f"{model} belongs to another key", code="not_owner"
        )
    row = state.store.get(AdapterRow, model)
    remove_adapter(state, model)
    if row is not None:
        _free_files(state, Path(row.folder))
    return {"id": model, "object": "model", "deleted": True}


def _free_files(state: ServerState, folder: Path) -> None:
    """Delete the adapter of a job, where no other name refers to it."""
    own = state.settings.state_dir.resolve() / "adapters"
    is_used = state.store.query(AdapterRow, AdapterRow.folder == str(folder), limit=1)
    if not is_used and own in folder.resolve().parents:
        shutil.rmtree(folder, ignore_errors=True)


@router.get("/v1/adapters")
def list_adapters(request: Request) -> dict[str, Any]:
    """Return the adapters that the caller can see, with method, size and location.

    For administrators, `unserved` has those that could not be loaded, each with the reason.
    """
    state, caller = get_state(request), current_principal(request)
    data = [to_response(entry) for entry in state.visible_adapters(caller)]
    if not caller.admin:
        return {"object": "list", "data": data}
    unserved = [
        {"id": name, "object": "adapter", "owner": one.owner, "reason": one.reason}
        for name, one in sorted(state.unserved.items())
    ]
    return {"object": "list", "data": data, "unserved": unserved}


@router.post("/v1/adapters", status_code=201)
def load(body: LoadAdapterRequest, request: Request, caller: Admin) -> JSONResponse:
    """Register an adapter."""
    state = get_state(request)
    folder = resolve_adapter_path(state, body.folder)
    return JSONResponse(to_response(register_adapter(state, body.name, folder, body.owner)), 201)


@router.put("/v1/adapters/{name}")
def replace(
    name: str, body: ReplaceAdapterRequest, request: Request, caller: Admin
) -> dict[str, Any]:
    """Give a name to another adapter; requests that run keep the previous one to their end."""
    state = get_state(request)
    _check_registered(state, name)
    return to_response(replace_adapter(state, name, resolve_adapter_path(state, body.folder)))


@router.post("/v1/adapters/{name}/rename")
def rename(
    name: str, body: RenameAdapterRequest, request: Request, caller: Admin
) -> dict[str, Any]:
    """Rename an adapter."""
    state = get_state(request)
    _check_registered(state, name)
    check_name(state, body.name)
    try:
        entry = state.engine.registry.rename(name, body.name)
    except AdapterError as error:
        raise to_api_error(error, "name") from None
    try:
        _rename_row(state, name, body.name)
    except BaseException:  # the response is an error, and nothing has changed
        state.engine.registry.rename(body.name, name)
        raise
    state.metrics.forget(name)
    return to_response(entry)


def _rename_row(state: ServerState, name: str, new: str) -> None:
    with state.store.write() as session:
        row = session.get(AdapterRow, name)
        if row is not None:
            session.delete(row)
            values = {"folder": row.folder, "owner": row.owner, "created": row.created}
            session.add(AdapterRow(name=new, bytes=row.bytes, **values))


@router.delete("/v1/adapters/{name}")
def unload(name: str, request: Request, caller: Admin) -> dict[str, Any]:
    """Unregister an adapter; its files are kept."""
    state = get_state(request)
    _check_registered(state, name)
    remove_adapter(state, name)
    return {"id": name, "object": "adapter", "deleted": True}


def register_adapter(
    state: ServerState,
    name: str,
    folder: Path,
    owner: str | None,
    params: tuple[str, str] = ("name", "folder"),
) -> RegisteredAdapter:
    """Register an adapter in the engine, and in the store for the time after a restart.

    Args:
        params: how the request calls name and folder.

    Raises:
        APIError: 400 where the adapter cannot be served under this name.
    """
    check_name(state, name, params[0])
    try:
        entry = state.engine.registry.add(name, adapter_folder(folder), owner)
    except (AdapterError, AuditError) as error:
        raise to_api_error(error, params[1]) from None
    try:
        with state.store.write() as session:
            session.merge(AdapterRow(name=name, folder=str(folder), owner=owner))
    except BaseException:
        state.engine.registry.remove(name)
        raise
    return entry


def replace_adapter(
    state: ServerState, name: str, folder: Path, param: str = "folder"
) -> RegisteredAdapter:
    """Give a name to another adapter, in the engine and in the store."""
    before = state.engine.registry.get(name)
    try:
        entry = state.engine.registry.replace(name, adapter_folder(folder))
    except (AdapterError, AuditError) as error:
        raise to_api_error(error, param) from None
    try:
        with state.store.write() as session:
            session.merge(AdapterRow(name=name, folder=str(folder), owner=entry.owner))
    except BaseException:
        if before is not None:
            state.engine.registry.replace(name, Path(before.folder))
        raise
    return entry


def remove_adapter(state: ServerState, name: str) -> None:
    """Remove a name from the store, then from the engine: after an error it is served as before."""
    with state.store.write() as session:
        row = session.get(AdapterRow, name)
        if row is not None:
            session.delete(row)
    try:
        state.engine.registry.remove(name)
    except AdapterError as error:
        raise to_api_error(error, "name") from None
    state.metrics.forget(name)


def _check_registered(state: ServerState, name: str) -> None:
    if state.engine.registry.get(name) is None:
        raise not_found("adapter", name)


def to_response(entry: RegisteredAdapter) -> dict[str, Any]:
    """Return the response object of an adapter, without its path on this machine."""
    return {
        "id": entry.name,
        "object": "adapter",
        "hash": entry.hash,
        "method": entry.method,
        "rank": entry.rank,
        "bytes": entry.bytes,
        "state": entry.state,
        "owner": entry.owner,
        "hits": entry.hits,
        "tokens": entry.tokens,
        "load_seconds": entry.load_seconds,
    }
