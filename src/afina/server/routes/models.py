"""Who can be body: GET /v1/models; and for administration, adapters coming, changing and going while others are body."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

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
STARTED = int(time.time())
Admin = Annotated[Principal, Depends(require_admin)]
Folder = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class LoadAdapterRequest(StrictRequest):
    """An adapter to load: a folder below one of those that the server was given, as it is called from there."""

    name: str
    folder: Folder
    owner: str | None = Field(
        None, max_length=200, description="the key that it belongs to; by default it is public"
    )

    @field_validator("name")
    @classmethod
    def _can_be_named(cls, name: str) -> str:
        return checked_name(name)


class ReplaceAdapterRequest(StrictRequest):
    """What an adapter's name shall point at from now on."""

    folder: Folder


class RenameAdapterRequest(StrictRequest):
    """An adapter's new name."""

    name: str

    @field_validator("name")
    @classmethod
    def _can_be_named(cls, name: str) -> str:
        return checked_name(name)


def checked_name(name: str) -> str:
    """A name that may stand in a request's model: no comma, no slash, and none that means something else."""
    if not NAME.fullmatch(name) or name == AUTO:
        raise PydanticCustomError(
            "name", "name: letters, digits and _ . : @ -, at most 200, and not 'auto'"
        )
    return name


def resolve_adapter_path(state: ServerState, folder: str) -> Path:
    """The folder `folder` below an allowed root; raises `Refusal` where it, or a link in it, leads out of there."""
    path = Path(folder)
    if path.is_absolute() or ".." in path.parts or "\0" in folder or "\\" in folder:
        raise APIError(
            400,
            "a folder is given as it is called below the server's adapters: no / before it, no ..",
            "folder",
        )
    for root in (
        place.expanduser().resolve()
        for place in [*state.settings.adapters, state.settings.state_dir / "adapters"]
    ):
        there = (root / path).resolve()
        if there.is_dir():
            if not all(file.resolve().is_relative_to(root) for file in (there, *there.rglob("*"))):
                raise APIError(
                    400, f"{folder}: a link in it leads out of the adapters' folder", "folder"
                )
            return there
    raise APIError(400, f"no folder {folder!r} below the server's adapters", "folder")


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """The base, and the adapters that the caller may see."""
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
        for entry in state.entries(caller)
    ]
    return {"object": "list", "data": [base, *adapters]}


@router.get("/v1/models/{model:path}")
def get_model(model: str, request: Request) -> dict[str, Any]:
    """One of them."""
    for one in list_models(request)["data"]:
        if one["id"] == model:
            return dict(one)
    raise not_found("model", model)


@router.delete("/v1/models/{model:path}")
def delete_model(model: str, request: Request) -> dict[str, Any]:
    """Take a fine-tuned model away: its owner may, and an administrator."""
    state, caller = get_state(request), current_principal(request)
    entry = state.visible_adapter(caller, model)
    if entry is None:
        raise not_found("model", model)
    if not caller.admin and (caller.name is None or entry.owner != caller.name):
        raise APIError(403 if caller.name else 401, f"{model} is not yours", code="not_owner")
    _remove(state, model)
    return {"id": model, "object": "model", "deleted": True}


@router.get("/v1/adapters")
def list_adapters(request: Request) -> dict[str, Any]:
    """The adapters that the caller may see, with what they are and where they are now."""
    return {
        "object": "list",
        "data": [
            to_response(entry) for entry in get_state(request).entries(current_principal(request))
        ],
    }


@router.post("/v1/adapters", status_code=201)
def load(body: LoadAdapterRequest, request: Request, caller: Admin) -> JSONResponse:
    """Put an adapter on the shelf."""
    state = get_state(request)
    folder = resolve_adapter_path(state, body.folder)
    return JSONResponse(to_response(register_adapter(state, body.name, folder, body.owner)), 201)


@router.put("/v1/adapters/{name}")
def replace(name: str, body: ReplaceAdapterRequest, request: Request, caller: Admin) -> dict[str, Any]:
    """Let a name point at another adapter; who asked before gets the old one to the end."""
    state = get_state(request)
    _known(state, name)
    folder = resolve_adapter_path(state, body.folder)
    try:
        entry = state.engine.registry.replace(name, folder)
    except (AdapterError, AuditError) as error:
        raise to_api_error(error, "folder") from None
    with state.store.write() as session:
        session.merge(AdapterRow(name=name, folder=str(folder), owner=entry.owner))
    return to_response(entry)


@router.post("/v1/adapters/{name}/rename")
def rename(name: str, body: RenameAdapterRequest, request: Request, caller: Admin) -> dict[str, Any]:
    """Another name for an adapter."""
    state = get_state(request)
    _known(state, name)
    try:
        entry = state.engine.registry.rename(name, body.name)
    except AdapterError as error:
        raise to_api_error(error, "name") from None
    with state.store.write() as session:
        if (row := session.get(AdapterRow, name)) is not None:
            session.delete(row)
            session.add(
                AdapterRow(name=body.name, folder=row.folder, owner=row.owner, created=row.created)
            )
    state.metrics.forget(name)
    return to_response(entry)


@router.delete("/v1/adapters/{name}")
def unload(name: str, request: Request, caller: Admin) -> dict[str, Any]:
    """Take an adapter off the shelf; its files stay."""
    state = get_state(request)
    _known(state, name)
    _remove(state, name)
    return {"id": name, "object": "adapter", "deleted": True}


def register_adapter(
    state: ServerState, name: str, folder: Path, owner: str | None
) -> RegisteredAdapter:
    """Put an adapter on the shelf, and into the tables, so that it is there after a restart; raises `Refusal`."""
    if name == state.base_name:
        raise APIError(400, f"{name} is the base", "name")
    try:
        entry = state.engine.registry.add(name, adapter_folder(folder), owner)
    except (AdapterError, AuditError) as error:
        raise to_api_error(error, "folder") from None
    try:
        with state.store.write() as session:
            session.merge(AdapterRow(name=name, folder=str(folder), owner=owner))
    except BaseException:
        state.engine.registry.remove(name)
        raise
    return entry


def _remove(state: ServerState, name: str) -> None:
    try:
        state.engine.registry.remove(name)
    except AdapterError as error:
        raise to_api_error(error, "name") from None
    with state.store.write() as session:
        if (row := session.get(AdapterRow, name)) is not None:
            session.delete(row)
    state.metrics.forget(name)


def _known(state: ServerState, name: str) -> None:
    if state.engine.registry.get(name) is None:
        raise not_found("adapter", name)


def to_response(entry: RegisteredAdapter) -> dict[str, Any]:
    """An adapter for people and machines; where it lies on this machine is not told."""
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
