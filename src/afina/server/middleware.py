"""ASGI middleware around every request: paths, keys, size of the body, one line of the log.

Azure's paths are rewritten, the API key is checked, the body is counted while it is received, and
after the response one line is logged. `cancel_on_disconnect` stops work for a client that has
disconnected.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afina.server.errors import APIError
from afina.server.fair_pool import CLIENT
from afina.server.logs import LOG
from afina.server.state import ServerState

DEPLOYMENT = re.compile(r"/openai/deployments/(.+?)/(chat/completions|completions|embeddings)")
PUBLIC_PATHS = ("/", "/docs", "/health", "/healthz", "/readyz")  # without a key
UPLOAD = "/v1/files"
CALLER = "afina.caller"  # key of the scope of an internal request: its sender
BODY_SECONDS = 120.0  # a body that takes longer to arrive is rejected
FORM_BYTES = 65_536  # of an upload besides the file: multipart boundaries and fields
Result = TypeVar("Result")


class ClientDisconnected(Exception):
    """The client disconnected before the response was complete."""


class RequestMiddleware:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, request_id, status = time.perf_counter(), f"req-{uuid.uuid4().hex}", 500
        has_begun = False
        log = {"request": request_id, "method": scope["method"], "path": scope["path"]}
        scope.setdefault("state", {})["log"] = log

        is_head = scope["method"] == "HEAD"  # answered like GET, without the body
        if is_head:
            scope["method"] = "GET"

        async def answer(message: Message) -> None:
            nonlocal status, has_begun
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if "ignored" in log:
                    headers["x-afina-ignored"] = log["ignored"]
            await send(message)

        try:
            try:
                limit = self._admit(scope)
                body = _measured(receive, limit)
                if scope["method"] in ("POST", "PUT", "PATCH") and scope["path"] != UPLOAD:
                    body = await _with_bounded_depth(body)
                await self.app(scope, body, answer)
            except APIError as error:
                await error.response()(scope, receive, answer)
        except ClientDisconnected:
            status = 499  # as in nginx: client closed request
        except asyncio.CancelledError:  # the server stops, and its time for requests is over
            if not has_begun:
                stopping = APIError(
                    503, "the server is stopping", code="stopping", retry_after=10.0
                )
                await stopping.response()(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.state.metrics.requests.labels(route, status).inc()
            seconds = round(time.perf_counter() - began, 4)
            LOG.info("request", extra={**log, "status": status, "seconds": seconds})

    def _admit(self, scope: Scope) -> int:
        """Rewrite the path, check the key, and return the largest size of the body in bytes.

        Raises:
            APIError: 400, 401 or 413.
        """
        _rewrite_azure_path(scope)
        if scope["path"] != "/" and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
            scope["raw_path"] = scope["path"].encode()
        path, headers = scope["path"], Headers(scope=scope)
        upload = path == UPLOAD and scope["method"] == "POST"
        settings = self.state.settings
        limit = settings.max_file_bytes + FORM_BYTES if upload else settings.max_body_bytes
        if path not in PUBLIC_PATHS:
            address = (scope.get("client") or ("", 0))[0]
            caller = scope.get(CALLER) or replace(self.state.keys.caller(headers), address=address)
            scope["state"]["caller"], scope["state"]["log"]["key"] = caller, caller.name
            CLIENT.set(caller.client)
            if upload and caller.name is None and not caller.admin:
                what = "an upload needs a key: Authorization: Bearer KEY"
                raise APIError(401, what, code="no_key")
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 18:
            raise APIError(400, f"content-length {length[:20]!r} is not a number of bytes")
        if int(length) > limit:
            raise _body_too_long(limit)
        return limit


def _rewrite_azure_path(scope: Scope) -> None:
    """Rewrite the paths of Azure's clients to /v1/...

    They are /openai/v1/..., and with api-version /openai/deployments/NAME/... or /openai/...
    """
    path: str = scope["path"]
    if not path.startswith("/openai/"):
        return
    if not path.startswith("/openai/v1/"):
        if b"api-version=" not in scope["query_string"]:
            what = "api-version is missing: Azure's paths need it, paths under /v1 do not"
            raise APIError(400, what, "api-version")
        found = DEPLOYMENT.fullmatch(path)
        if found:
            scope["state"]["deployment"] = found[1]
            path = f"/openai/{found[2]}"
    path = path.removeprefix("/openai").removeprefix("/v1")
    scope["path"], scope["raw_path"] = f"/v1{path}", f"/v1{path}".encode()


def _body_too_long(limit: int) -> APIError:
    return APIError(413, f"the body is longer than {limit:,} bytes", code="body_too_long")


def _measured(receive: Receive, limit: int) -> Receive:
    """Wrap `receive`: raises 413 beyond `limit` bytes, and 408 after `BODY_SECONDS`."""
    size, is_complete, latest = 0, False, time.monotonic() + BODY_SECONDS

    async def measured() -> Message:
        nonlocal size, is_complete
        if is_complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), latest - time.monotonic())
        except TimeoutError:
            what = f"the body did not arrive within {BODY_SECONDS:.0f} s"
            raise APIError(408, what, code="slow_body") from None
        size += len(message.get("body", b""))
        is_complete = not message.get("more_body", False)
        if size > limit:
            raise _body_too_long(limit)
        return message

    return measured


async def _with_bounded_depth(receive: Receive) -> Receive:
    """Return a receiver of the same body; raise `APIError` 400 if it is nested too deeply.

    pydantic's parser stops at 200 levels of JSON, whatever follows; others recurse without a limit.
    Other errors of the body are left to the route.
    """
    messages: list[Message] = []
    while not messages or messages[-1].get("more_body"):
        messages.append(await receive())
        if messages[-1]["type"] == "http.disconnect":
            raise ClientDisconnected
    body = b"".join(message.get("body", b"") for message in messages)
    try:
        from_json(body)
    except ValueError as error:
        if "recursion limit" in str(error):
            what = "the body is not valid: its JSON has more than 200 levels"
            raise APIError(400, what, code="too_deep") from None
    except RecursionError:
        raise APIError(400, "the body is not valid: its JSON is nested too deep") from None
    complete: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return complete.pop() if complete else await receive()

    return again


async def cancel_on_disconnect(
    receive: Receive, work: Coroutine[Any, Any, Result] | Awaitable[Result]
) -> Result:
    """Return the result of `work`; cancel it when the client disconnects.

    Raises:
        ClientDisconnected: The client disconnected before `work` was done.
    """
    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for future in (task, disconnect):
            future.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
