"""Batches: the requests in an uploaded file, run one after another through the server itself.

    validating --> in_progress --> completed          failed: a line of the file is not valid
                        ^--'  after a restart, the lines without a result are run
                   cancelling --> cancelled           results so far are kept

Each line is an ordinary request of the batch's owner: limits, fair queues and visibility are those
of its key. A result is appended to a file as soon as it is there.
"""

import asyncio
import json
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from starlette.types import ASGIApp, Message

from afina.server.auth import Principal
from afina.server.logs import LOG
from afina.server.middleware import CALLER
from afina.server.routes.files import path_of
from afina.server.state import ServerState
from afina.server.store import BatchRow, FileRow, now

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINES = 50_000
MAX_ERRORS = 20  # errors of lines that are returned with a failed batch
CONCURRENCY = 4  # requests of one batch at a time
RETRY_SECONDS = 5.0  # after 429 or 503, where the response names no time
OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"


class BatchRunner:
    """Runs the batches of one server on its event loop."""

    def __init__(self, state: ServerState, app: ASGIApp) -> None:
        self.state, self.app = state, app
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def resume(self) -> None:
        """Continue the batches that were running when the server stopped; on the event loop."""
        self._loop = asyncio.get_running_loop()
        running = BatchRow.status.in_(("validating", "in_progress", "cancelling"))
        for row in self.state.store.query(BatchRow, running):
            self.start(row.id)

    def start(self, batch: str) -> None:
        """Run a batch; any thread may call."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin, batch)

    def _begin(self, batch: str) -> None:
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._tasks[batch] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch, None))

    def stop(self) -> None:
        """Stop all batches; they continue after the next start."""
        for task in self._tasks.values():
            task.cancel()

    async def _run(self, batch: str) -> None:
        try:
            await self._work(batch)
        except Exception:  # a full disk, a lost database: the batch has failed, and not the server
            LOG.exception("a batch failed", extra={"batch": batch})
            errors = [{"code": "server_error", "message": "the server failed", "line": None}]
            self._update(batch, status="failed", finished=now(), errors=errors)

    async def _work(self, batch: str) -> None:
        row = self.state.store.get(BatchRow, batch)
        assert row is not None
        lines, errors = await asyncio.to_thread(self._read, row)
        if errors:
            self._update(batch, status="failed", finished=now(), errors=errors[:MAX_ERRORS])
            return
        if row.status == "validating":
            self._update(batch, status="in_progress", started=now(), total=len(lines))
        folder = self._folder(batch)
        done = await asyncio.to_thread(_done, folder)
        todo = [line for line in lines if line["custom_id"] not in done]
        slots = asyncio.Semaphore(CONCURRENCY)

        async def run(line: Mapping[str, Any]) -> None:
            async with slots:
                if self._status(batch) == "in_progress":
                    await self._run_line(row, line, folder)

        await asyncio.gather(*(run(line) for line in todo))
        await asyncio.to_thread(self._finish, row, folder)

    def _read(self, row: BatchRow) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the lines of a batch, and the errors of those that are not valid."""
        file = self.state.store.get(FileRow, row.input_file)
        if file is None:
            return [], [_error(None, "the input file was deleted", "input_file_id")]
        lines: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        seen: set[str] = set()
        with path_of(self.state, file).open(encoding="utf-8", errors="replace") as stream:
            for number, text in enumerate(stream, start=1):
                if not text.strip():
                    continue
                problem = _check(text, row.endpoint, seen, lines)
                if problem is not None:
                    errors.append(_error(number, f"{file.name}:{number}: {problem[1]}", problem[0]))
                if len(lines) > MAX_LINES:
                    what = f"{file.name} has more than {MAX_LINES:,} lines"
                    return [], [_error(None, what, "input_file_id")]
        if not lines and not errors:
            errors.append(_error(None, f"{file.name} has no requests", "input_file_id"))
        return lines, errors

    async def _run_line(self, row: BatchRow, line: Mapping[str, Any], folder: Path) -> None:
        caller = Principal(row.owner, row.admin)
        while True:
            status, headers, body = await call(self.app, caller, line["url"], line["body"])
            if status not in (429, 503) or self._status(row.id) != "in_progress":
                break
            await asyncio.sleep(float(headers.get("retry-after", RETRY_SECONDS)))
        request = headers.get("x-request-id", "")
        response = {"status_code": status, "request_id": request, "body": body}
        result = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line["custom_id"],
            "response": response,
            "error": None,
        }
        name = OUTPUT if status < 400 else ERRORS
        await asyncio.to_thread(_append, folder / name, result)

    def _finish(self, row: BatchRow, folder: Path) -> None:
        """Make files of the results, and end the batch."""
        counts, files = {}, {}
        for name in (OUTPUT, ERRORS):
            path = folder / name
            data = path.read_bytes() if path.exists() else b""
            counts[name] = data.count(b"\n")
            if data:
                files[name] = FileRow(
                    id=f"file-{uuid.uuid4().hex}",
                    owner=row.owner,
                    name=f"{row.id}_{name}",
                    purpose="batch_output",
                    bytes=len(data),
                )
                path.replace(path_of(self.state, files[name]))
        self.state.store.add(*files.values())
        cancelled = self._status(row.id) == "cancelling"
        self._update(
            row.id,
            status="cancelled" if cancelled else "completed",
            finished=now(),
            completed=counts[OUTPUT],
            failed=counts[ERRORS],
            output_file=files[OUTPUT].id if OUTPUT in files else None,
            error_file=files[ERRORS].id if ERRORS in files else None,
        )

    def counts(self, row: BatchRow) -> tuple[int, int]:
        """Return how many requests have succeeded and failed so far."""
        if row.status not in ("in_progress", "cancelling"):
            return row.completed, row.failed
        folder = self._folder(row.id)
        return _count(folder / OUTPUT), _count(folder / ERRORS)

    def _folder(self, batch: str) -> Path:
        folder = self.state.settings.state_dir / "batches" / batch
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _status(self, batch: str) -> str:
        row = self.state.store.get(BatchRow, batch)
        return row.status if row is not None else "cancelling"

    def _update(self, batch: str, **values: Any) -> None:
        with self.state.store.write() as session:
            row = session.get(BatchRow, batch)
            if row is not None:
                for name, value in values.items():
                    setattr(row, name, value)


def _check(
    text: str, endpoint: str, seen: set[str], lines: list[dict[str, Any]]
) -> tuple[str, str] | None:
    """Add a line to `lines`, or return (parameter, sentence) of what is wrong with it."""
    try:
        line = from_json(text)
    except ValueError:
        return "body", "the line is not valid JSON"
    if not isinstance(line, dict):
        return "body", "the line must be an object with custom_id, method, url and body"
    name = line.get("custom_id")
    if not isinstance(name, str) or not name:
        return "custom_id", "custom_id is missing: a text is expected"
    if name in seen:
        return "custom_id", f"custom_id {name[:80]!r} appears twice"
    if line.get("method") != "POST":
        return "method", "method must be POST"
    if line.get("url") != endpoint:
        return "url", f"url must be {endpoint}, the endpoint of the batch"
    if not isinstance(line.get("body"), dict) or line["body"].get("stream"):
        return "body", "body must be an object, without stream"
    seen.add(name)
    lines.append(line)
    return None


def _error(line: int | None, message: str, param: str) -> dict[str, Any]:
    return {"code": "invalid_request", "line": line, "message": message, "param": param}


def _done(folder: Path) -> set[str]:
    """Return the lines that have a result; an incomplete last line is cut off."""
    done = set()
    for name in (OUTPUT, ERRORS):
        path = folder / name
        if not path.exists():
            continue
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            os.truncate(path, len(complete))
        done |= {json.loads(line)["custom_id"] for line in complete.splitlines()}
    return done


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _append(path: Path, result: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


async def call(
    app: ASGIApp, caller: Principal, path: str, body: Mapping[str, Any]
) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and body of a request to the application itself."""
    data = json.dumps(body).encode()
    messages: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]
    parts: list[bytes] = []
    status, headers = 500, {}

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # the client stays connected
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ],
        "client": None,
        "server": None,
        CALLER: caller,
    }
    run: Callable[..., Awaitable[None]] = app
    await run(scope, receive, send)
    return status, headers, json.loads(b"".join(parts))
