"""API keys: the principal of a request, its rights, and what it can see.

    no key        may send requests to models, where the server has no keys for use
    a key         may send requests; its files, jobs and adapters are visible to itself only
    an admin key  can see everything, and load, replace, rename and unload adapters

Keys are compared by their SHA-256, so that the time of a comparison does not depend on how many
characters of a guess are right.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass, field
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
    """The sender of a request: the name of its key (None without one) and its rights.

    Files, jobs and adapters that it creates belong to `name`.

    Attributes:
        address: network address of a sender without a key.
    """

    name: str | None = None
    admin: bool = False
    address: str = field(default="", compare=False)

    @property
    def client(self) -> str:
        """The client of fair queues: a key, or an address without a key."""
        return f"address {self.address}" if self.name is None else f"key {self.name}"

    def can_see(self, owner: str | None) -> bool:
        """Return whether something that belongs to `owner` (None: public) is visible."""
        return self.admin or owner is None or owner == self.name


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class APIKeys:
    """All keys of a server."""

    def __init__(self, settings: ServeSettings) -> None:
        """Read the keys of `settings.api_key_file`, and the admin key.

        Without an admin key in the file it is AFINA_ADMIN_KEY, or a key generated at the first
        start and stored in `state_dir`/admin.key (mode 600).
        """
        self.insecure = settings.insecure
        self._callers = _read_keys(settings.api_key_file) if settings.api_key_file else {}
        self.needs_key = any(not caller.admin for caller in self._callers.values())
        if any(caller.admin for caller in self._callers.values()) or self.insecure:
            return
        key = os.environ.get("AFINA_ADMIN_KEY") or _stored_key(settings.state_dir / "admin.key")
        self._callers[_digest(key)] = Principal(ADMIN, True)

    def caller(self, headers: Any) -> Principal:
        """Return the sender of these headers (Authorization: Bearer KEY, or Azure's api-key).

        Raises:
            APIError: 401 where a key is needed and none or an unknown one is given.
        """
        bearer = headers.get("authorization", "")
        key = bearer[7:].strip() if bearer[:7].lower() == "bearer " else headers.get("api-key", "")
        known = self._callers.get(_digest(key)) if key else None
        if known is not None:
            return known
        if self.insecure:
            return Principal(None, True)
        if self.needs_key:
            raise APIError(401, _describe_key(key), code="invalid_api_key")
        return Principal()


def _describe_key(key: str) -> str:
    """Return why a key does not open the server, without the key itself."""
    if not key:
        return "no API key was sent: Authorization: Bearer KEY, or the header api-key"
    shown = f"{key[:3]}...{key[-4:]}" if len(key) >= 16 else f"of {len(key)} characters"
    return f"the API key {shown} is not among those of --api-key-file"


def _stored_key(file: Path) -> str:
    """Return the key in `file`, generated where the file is missing."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        write_text(file, f"afina-{secrets.token_urlsafe(24)}\n")
        file.chmod(0o600)
    return file.read_text(encoding="utf-8").strip()


def _read_keys(file: Path) -> dict[str, Principal]:
    """Read a YAML file of keys: `NAME: KEY`, or `NAME: {key: KEY, admin: true}`.

    `sha256: DIGEST` in place of `key` keeps the key out of the file.
    """
    callers: dict[str, Principal] = {}
    for name, value in read_yaml(file).items():
        entry = {"key": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or not set(entry) <= {"key", "sha256", "admin"}:
            raise SettingsError(
                "expected NAME: KEY, or NAME: {key: KEY, admin: true}", where=f"{file}:{name}"
            )
        digest = _digest(str(entry["key"])) if entry.get("key") else str(entry.get("sha256", ""))
        if len(digest) != 64:
            raise SettingsError(
                "key is missing, or sha256 is not 64 hex digits", where=f"{file}:{name}"
            )
        callers[digest] = Principal(str(name), entry.get("admin") is True)
    return callers


def current_principal(request: Request) -> Principal:
    """Return the sender of a request, which the middleware has checked."""
    caller: Principal = request.state.caller
    return caller


def require_key(request: Request) -> Principal:
    """Return the sender of a request about files or jobs; raise `APIError` 401 without a key."""
    caller = current_principal(request)
    if caller.name is None and not caller.admin:
        raise APIError(
            401,
            "this path needs an API key (Authorization: Bearer KEY): one of --api-key-file, or the "
            "admin key in admin.key of the server's state folder",
            code="no_key",
        )
    return caller


def require_admin(request: Request) -> Principal:
    """Return the sender of a request to change the server; raise 401 or 403 without admin key."""
    caller = require_key(request)
    if not caller.admin:
        what = f"this path needs an admin key; the key {caller.name!r} is none"
        raise APIError(403, what, code="not_admin")
    return caller
