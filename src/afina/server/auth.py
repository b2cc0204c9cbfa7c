"""Keys: who is asking, what they may do, and what they may see.

    no key        asks, where no keys for use were given
    a key         asks; its files, jobs and adapters are its own, and nobody else's
    an admin key  sees everything, and loads, replaces, renames and unloads adapters

Keys are compared by their SHA-256, so that no time taken tells how much of a guess was right.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request

from afina.errors import SettingsError
from afina.io.atomic import write_text
from afina.server.errors import APIError
from afina.settings import ServeSettings, read_yaml

ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """Who asks. `name` is that of the key, None without one; what they make belongs to `name`."""

    name: str | None = None
    admin: bool = False

    def can_see(self, owner: str | None) -> bool:
        """Whether something of `owner` (None: public) is there for them."""
        return self.admin or owner is None or owner == self.name


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class APIKeys:
    """All keys of a server."""

    def __init__(self, settings: ServeSettings) -> None:
        """Read `settings.keys`, AFINA_ADMIN_KEY, or the key made at the first start, in `state`/admin.key (mode 600)."""
        self.insecure = settings.insecure
        self._callers = _read(settings.api_key_file) if settings.api_key_file else {}
        self.closed = any(not caller.admin for caller in self._callers.values())
        if any(caller.admin for caller in self._callers.values()) or self.insecure:
            return
        self._callers[
            _digest(os.environ.get("AFINA_ADMIN_KEY") or _made(settings.state_dir / "admin.key"))
        ] = Principal(ADMIN, True)

    def caller(self, headers: Any) -> Principal:
        """Who sends these headers (Authorization: Bearer KEY, or Azure's api-key); raises 401 where a key is needed."""
        bearer = headers.get("authorization", "")
        key = bearer[7:].strip() if bearer[:7].lower() == "bearer " else headers.get("api-key", "")
        known = self._callers.get(_digest(key)) if key else None
        if known is not None:
            return known
        if self.insecure:
            return Principal(None, True)
        if self.closed:
            raise APIError(
                401,
                "this server wants a key that it knows: Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return Principal()


def _made(file: Path) -> str:
    """The key in `file`, which is made if there is none."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        write_text(file, f"afina-{secrets.token_urlsafe(24)}\n")
        file.chmod(0o600)
    return file.read_text(encoding="utf-8").strip()


def _read(file: Path) -> dict[str, Principal]:
    """A YAML file of keys: `NAME: KEY`, or `NAME: {key: KEY, admin: true}`; sha256 in place of key hides it."""
    callers: dict[str, Principal] = {}
    for name, told in read_yaml(file).items():
        entry = {"key": told} if isinstance(told, str) else told
        if not isinstance(entry, dict) or not set(entry) <= {"key", "sha256", "admin"}:
            raise SettingsError(
                "expected NAME: KEY, or NAME: {key: KEY, admin: true}", where=f"{file}:{name}"
            )
        digest = _digest(str(entry["key"])) if entry.get("key") else str(entry.get("sha256", ""))
        if len(digest) != 64:
            raise SettingsError(
                "a key, or the sha256 of one in hex, is missing", where=f"{file}:{name}"
            )
        callers[digest] = Principal(str(name), entry.get("admin") is True)
    return callers


def current_principal(request: Request) -> Principal:
    """For reading and asking: anybody, or any key where keys are wanted."""
    caller: Principal = request.state.caller
    return caller


def require_key(request: Request) -> Principal:
    """For what is kept (files, jobs): a key, whose they will be."""
    caller = current_principal(request)
    if caller.name is None and not caller.admin:
        raise APIError(
            401,
            "this needs a key: Authorization: Bearer KEY (the server's own is in its admin.key)",
            code="no_key",
        )
    return caller


def require_admin(request: Request) -> Principal:
    """For what changes the server: an admin key."""
    caller = require_key(request)
    if not caller.admin:
        raise APIError(403, "this needs a key for administration", code="not_admin")
    return caller
