"""A small server of the Hub's HTTP API: repositories of models, commits, downloads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories by name: private or not, and files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], private: bool = True) -> None:
        self.repos[name] = {"private": private, "files": dict(files), "commits": 1}

    def sha(self, name: str) -> str:
        count = self.repos[name]["commits"]
        return hashlib.sha1(f"{name} {count}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *given: Any) -> None:
        """Print nothing."""

    def answer(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def not_found(self) -> None:
        self.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.describe(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.hub.repos[match[1]]["files"]
            return self.answer(200, [self.entry(name, text) for name, text in files.items()])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.download(match[1], match[3])
        return self.not_found()

    do_HEAD = do_GET

    def entry(self, name: str, text: bytes) -> dict[str, Any]:
        return {
            "type": "file",
            "path": name,
            "size": len(text),
            "oid": hashlib.sha1(text).hexdigest(),
        }

    def describe(self, name: str, revision: str | None) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.not_found()
        if revision not in (None, "main", self.hub.sha(name)):
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no"}
            return self.answer(404, {"error": "no"}, headers)
        files = [
            {"rfilename": n, "size": len(text), "blobId": hashlib.sha1(text).hexdigest()}
            for n, text in repo["files"].items()
        ]
        content = {
            "id": name,
            "sha": self.hub.sha(name),
            "private": repo["private"],
            "siblings": files,
        }
        return self.answer(200, content)

    def download(self, name: str, file: str) -> None:
        text = self.hub.repos[name]["files"][file]
        etag = {"ETag": f'"{hashlib.sha1(text).hexdigest()}"', "X-Repo-Commit": self.hub.sha(name)}
        self.answer(200, text, etag)

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        self.hub.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            is_private = bool(given.get("private")) or given.get("visibility") == "private"
            self.hub.repos[name] = {"private": is_private, "files": {}, "commits": 0}
            return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer(200, {"files": modes})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repo = self.hub.repos[match[1]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
            repo["commits"] += 1
            sha = self.hub.sha(match[1])
            url = f"{self.hub.url}/{match[1]}/commit/{sha}"
            return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})
        return self.answer(200, {}) if path == "/api/validate-yaml" else self.not_found()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve an empty Hub until the end of the block."""
    hub = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub, "protocol_version": "HTTP/1.1"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
