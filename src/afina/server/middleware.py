"""The door: every request comes in here, as plain ASGI, before anything of it is read.

Azure's paths become ours, the key is looked at, the body is measured while it comes in, and when the answer is out
one line goes into the log. `unless_gone` stops work for a client that has hung up.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afina.server.errors import APIError
from afina.server.logs import LOG
from afina.server.state import ServerState

DEPLOYMENT = re.compile(r"/openai/deployments/(.+?)/(chat/completions|completions|embeddings)")
PUBLIC_PATHS = ("/healthz", "/readyz")  # what a balancer asks, without a key
UPLOAD = "/v1/files"
BODY_SECONDS = 120.0  # a body that takes longer to come in is refused
Result = TypeVar("Result")


class ClientDisconnected(Exception):
    """The client has hung up: nobody is there to answer."""


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request in."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, number, status = time.perf_counter(), f"req-{uuid.uuid4().hex}", 500
        scope.setdefault("state", {})["log"] = log = {
            "request": number,
            "method": scope["method"],
            "path": scope["path"],
        }

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        try:
            try:
                limit = self._admit(scope)
                await self.app(scope, _measured(receive, limit), answer)
            except APIError as refusal:
                await refusal.response()(scope, receive, answer)
        except ClientDisconnected:
            status = 499
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.state.metrics.requests.labels(route, status).inc()
            LOG.info(
                "request",
                extra={**log, "status": status, "seconds": round(time.perf_counter() - began, 4)},
            )

    def _admit(self, scope: Scope) -> int:
        """Rewrite the path, find out who asks, and how long the body may be; raises `Refusal`."""
        _translate(scope)
        path, headers = scope["path"], Headers(scope=scope)
        upload = path == UPLOAD and scope["method"] == "POST"
        limit = (
            self.state.settings.max_file_bytes + 65_536
            if upload
            else self.state.settings.max_body_bytes
        )
        if path not in PUBLIC_PATHS:
            caller = self.state.keys.caller(headers)
            scope["state"]["caller"], scope["state"]["log"]["key"] = caller, caller.name
            if upload and caller.name is None and not caller.admin:
                raise APIError(401, "this needs a key: Authorization: Bearer KEY", code="no_key")
        told = headers.get("content-length", "0")
        if not told.isdigit() or len(told) > 18:
            raise APIError(400, "content-length is no number")
        if int(told) > limit:
            raise _too_long(limit)
        return limit


def _translate(scope: Scope) -> None:
    """The paths of Azure's clients: /openai/v1/..., and /openai/deployments/NAME/... or /openai/... with api-version."""
    path: str = scope["path"]
    if not path.startswith("/openai/"):
        return
    if not path.startswith("/openai/v1/"):
        if b"api-version=" not in scope["query_string"]:
            raise APIError(
                400,
                "api-version is missing: these are Azure's paths, others are under /v1",
                "api-version",
            )
        if found := DEPLOYMENT.fullmatch(path):
            scope["state"]["deployment"] = found[1]
            path = f"/openai/{found[2]}"
    path = path.removeprefix("/openai").removeprefix("/v1")
    scope["path"], scope["raw_path"] = f"/v1{path}", f"/v1{path}".encode()


def _too_long(limit: int) -> APIError:
    return APIError(413, f"the body is longer than {limit:,} bytes", code="body_too_long")


def _measured(receive: Receive, limit: int) -> Receive:
    """`receive` that raises 413 when more than `limit` bytes come in, and 408 when they take too long."""
    size, whole, latest = 0, False, time.monotonic() + BODY_SECONDS

    async def measured() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), latest - time.monotonic())
        except TimeoutError:
            raise APIError(
                408, f"the body did not come in within {BODY_SECONDS:.0f} s", code="slow_body"
            ) from None
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > limit:
            raise _too_long(limit)
        return message

    return measured


async def cancel_on_disconnect(
    receive: Receive, work: Coroutine[Any, Any, Result] | Awaitable[Result]
) -> Result:
    """The result of `work`, which is cancelled when the client hangs up; then `Gone` is raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hangs_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hangs_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
