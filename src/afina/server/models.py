"""Who can be asked: GET /v1/models; and for administration, adapters coming, changing and going while others are asked."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

from afina.delta.files import adapter_folder
from afina.engine.request import Entry
from afina.errors import AdapterError, AuditError
from afina.server.asked import Asked
from afina.server.keys import Caller, admin_of, caller_of
from afina.server.refusal import Refusal, not_found, refusal_of
from afina.server.state import AUTO, State, state_of
from afina.server.store import Adapter

router = APIRouter()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,199}")
STARTED = int(time.time())
Admin = Annotated[Caller, Depends(admin_of)]
Folder = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class LoadAsked(Asked):
    """An adapter to load: a folder below one of those that the server was given, as it is called from there."""

    name: str
    folder: Folder
    owner: str | None = Field(None, max_length=200, description="the key that it belongs to; by default it is public")

    @field_validator("name")
    @classmethod
    def _can_be_named(cls, name: str) -> str:
        return checked_name(name)


class ReplaceAsked(Asked):
    """What an adapter's name shall point at from now on."""

    folder: Folder


class RenameAsked(Asked):
    """An adapter's new name."""

    name: str

    @field_validator("name")
    @classmethod
    def _can_be_named(cls, name: str) -> str:
        return checked_name(name)


def checked_name(name: str) -> str:
    """A name that may stand in a request's model: no comma, no slash, and none that means something else."""
    if not NAME.fullmatch(name) or name == AUTO:
        raise PydanticCustomError("name", "name: letters, digits and _ . : @ -, at most 200, and not 'auto'")
    return name


def allowed(state: State, folder: str) -> Path:
    """The folder `folder` below an allowed root; raises `Refusal` where it, or a link in it, leads out of there."""
    path = Path(folder)
    if path.is_absolute() or ".." in path.parts or "\0" in folder or "\\" in folder:
        raise Refusal(400, "a folder is given as it is called below the server's adapters: no / before it, no ..", "folder")
    for root in (place.expanduser().resolve() for place in [*state.settings.adapters, state.settings.state / "adapters"]):
        there = (root / path).resolve()
        if there.is_dir():
            if not all(file.resolve().is_relative_to(root) for file in (there, *there.rglob("*"))):
                raise Refusal(400, f"{folder}: a link in it leads out of the adapters' folder", "folder")
            return there
    raise Refusal(400, f"no folder {folder!r} below the server's adapters", "folder")


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """The base, and the adapters that the caller may see."""
    state, caller = state_of(request), caller_of(request)
    base = {"id": state.base_name, "object": "model", "created": STARTED, "owned_by": "afina", "parent": None}
    created = {row.name: row.created for row in state.store.rows(Adapter)}
    adapters = [
        {"id": entry.name, "object": "model", "created": created.get(entry.name, STARTED),
         "owned_by": entry.owner or "afina", "parent": state.base_name}
        for entry in state.entries(caller)
    ]  # fmt: skip
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
    state, caller = state_of(request), caller_of(request)
    entry = state.entry(caller, model)
    if entry is None:
        raise not_found("model", model)
    if not caller.admin and (caller.name is None or entry.owner != caller.name):
        raise Refusal(403 if caller.name else 401, f"{model} is not yours", code="not_owner")
    _remove(state, model)
    return {"id": model, "object": "model", "deleted": True}


@router.get("/v1/adapters")
def list_adapters(request: Request) -> dict[str, Any]:
    """The adapters that the caller may see, with what they are and where they are now."""
    return {"object": "list", "data": [told(entry) for entry in state_of(request).entries(caller_of(request))]}


@router.post("/v1/adapters", status_code=201)
def load(asked: LoadAsked, request: Request, caller: Admin) -> JSONResponse:
    """Put an adapter on the shelf."""
    state = state_of(request)
    folder = allowed(state, asked.folder)
    return JSONResponse(told(place(state, asked.name, folder, asked.owner)), 201)


@router.put("/v1/adapters/{name}")
def replace(name: str, asked: ReplaceAsked, request: Request, caller: Admin) -> dict[str, Any]:
    """Let a name point at another adapter; who asked before gets the old one to the end."""
    state = state_of(request)
    _known(state, name)
    folder = allowed(state, asked.folder)
    try:
        entry = state.engine.shelf.replace(name, folder)
    except (AdapterError, AuditError) as error:
        raise refusal_of(error, "folder") from None
    with state.store.write() as session:
        session.merge(Adapter(name=name, folder=str(folder), owner=entry.owner))
    return told(entry)


@router.post("/v1/adapters/{name}/rename")
def rename(name: str, asked: RenameAsked, request: Request, caller: Admin) -> dict[str, Any]:
    """Another name for an adapter."""
    state = state_of(request)
    _known(state, name)
    try:
        entry = state.engine.shelf.rename(name, asked.name)
    except AdapterError as error:
        raise refusal_of(error, "name") from None
    with state.store.write() as session:
        if (row := session.get(Adapter, name)) is not None:
            session.delete(row)
            session.add(Adapter(name=asked.name, folder=row.folder, owner=row.owner, created=row.created))
    state.metrics.forget(name)
    return told(entry)


@router.delete("/v1/adapters/{name}")
def unload(name: str, request: Request, caller: Admin) -> dict[str, Any]:
    """Take an adapter off the shelf; its files stay."""
    state = state_of(request)
    _known(state, name)
    _remove(state, name)
    return {"id": name, "object": "adapter", "deleted": True}


def place(state: State, name: str, folder: Path, owner: str | None) -> Entry:
    """Put an adapter on the shelf, and into the tables, so that it is there after a restart; raises `Refusal`."""
    if name == state.base_name:
        raise Refusal(400, f"{name} is the base", "name")
    try:
        entry = state.engine.shelf.add(name, adapter_folder(folder), owner)
    except (AdapterError, AuditError) as error:
        raise refusal_of(error, "folder") from None
    try:
        with state.store.write() as session:
            session.merge(Adapter(name=name, folder=str(folder), owner=owner))
    except BaseException:
        state.engine.shelf.remove(name)
        raise
    return entry


def _remove(state: State, name: str) -> None:
    try:
        state.engine.shelf.remove(name)
    except AdapterError as error:
        raise refusal_of(error, "name") from None
    with state.store.write() as session:
        if (row := session.get(Adapter, name)) is not None:
            session.delete(row)
    state.metrics.forget(name)


def _known(state: State, name: str) -> None:
    if state.engine.shelf.find(name) is None:
        raise not_found("adapter", name)


def told(entry: Entry) -> dict[str, Any]:
    """An adapter for people and machines; where it lies on this machine is not told."""
    return {"id": entry.name, "object": "adapter", "hash": entry.hash, "method": entry.method, "rank": entry.rank,
            "bytes": entry.bytes, "state": entry.state, "owner": entry.owner, "hits": entry.hits,
            "tokens": entry.tokens, "load_seconds": entry.load_seconds}  # fmt: skip
