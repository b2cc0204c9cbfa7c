"""Random histories of two keys over the API: nothing of one is seen, changed or failed by the other.

A model of what each key owns is kept beside the server. AFINA_API_EXAMPLES sets the number of
histories (4 by default).
"""

import errno
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from starlette.testclient import TestClient

from afina.server.app import make_app
from afina.server.serve import build_server, close
from afina.server.store import Store
from afina.settings import ServeSettings
from helpers import until
from live import KEYS, make_adapters

OWNERS = strategies.sampled_from(["alice", "bob"])
NAMES = strategies.sampled_from(["one", "two"])
PICKS = strategies.integers(0, 20)
ROWS = json.dumps(
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
)
BODIES = [  # malformed in every layer: bytes, JSON, types, values, Unicode, depth
    b"", b"{", b"[]", b"null", b'{"model": 5}', b"\xff\xfe", b"[" * 3000, b'{"model": "\\ud800"}',
    b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "n": 1e9}',
    b'{"model": "base", "messages": [{"role": "x"}]}', b'{"model": "../..", "input": "a"}',
    b'{"training_file": "file-\\u0000", "model": "base"}', b'{"name": "a/b", "folder": "/etc"}',
]  # fmt: skip
PATHS = [
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/batches",
    "/v1/fine_tuning/jobs", "/v1/fine_tuning/alpha/graders/run", "/tokenize", "/v1/classify",
]  # fmt: skip
HISTORIES = int(os.environ.get("AFINA_API_EXAMPLES", "4"))
_world: dict[str, Any] = {"statuses": Counter()}


@pytest.fixture(scope="module", autouse=True)
def world(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("api")
    adapters = make_adapters(tiny, folder / "adapters", one={"rank": 4}, two={"rank": 2})
    (folder / "keys.yaml").write_text(KEYS)
    state = build_server(
        ServeSettings(
            base=str(tiny),
            adapters=[folder / "none"],
            state_dir=folder / "state",
            api_key_file=folder / "keys.yaml",
            dtype="float32",
        )
    )
    state.settings.adapters.append(adapters)  # loaded by requests only
    with TestClient(make_app(state), raise_server_exceptions=False) as http:
        _world.update(http=http, state=state, base=state.base_name)
        yield
    close(state)
    # histories that reach nothing would show nothing; a few may miss what is rare
    reached = {200, 201, 400, 403, 404, 500} if HISTORIES >= 20 else {200}
    assert reached <= set(_world["statuses"]), _world["statuses"]


@contextmanager
def full_disk() -> Iterator[None]:
    """Writes of the tables fail as on a full disk."""

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = Store.write
    Store.write = fail  # type: ignore[method-assign]
    try:
        yield
    finally:
        Store.write = before  # type: ignore[method-assign]


def _served_as(name: str) -> str | None:
    """Return the hash of what a name stands for."""
    entry = _world["state"].engine.registry.get(name)
    return entry and entry.hash


class ApiMachine(RuleBasedStateMachine):
    """Two clients and an administrator of one server; its worker takes no job."""

    @initialize()
    def begin(self) -> None:
        self.files: dict[str, list[str]] = {"alice": [], "bob": []}
        self.jobs: dict[str, dict[str, str]] = {"alice": {}, "bob": {}}
        self.batches: dict[str, list[str]] = {"alice": [], "bob": []}
        self.adapters: dict[str, str | None] = {}  # name -> owner
        self.threads: list[threading.Thread] = []

    def send(self, key: str, method: str, path: str, ok: tuple[int, ...], **more: Any) -> Any:
        headers = {"authorization": f"Bearer key-of-{key}"}
        found = _world["http"].request(method, path, headers=headers, **more)
        _world["statuses"][found.status_code] += 1
        assert found.status_code in ok, (path, found.status_code, found.text)
        if found.status_code >= 400:
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}
            other = {"alice": "bob", "bob": "alice"}.get(key, "-")
            assert other not in found.text and "Traceback" not in found.text
        return found

    # ---- files

    @rule(key=OWNERS, purpose=strategies.sampled_from(["fine-tune", "batch", "other"]))
    def upload(self, key: str, purpose: str) -> None:
        line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}}
        content = ROWS if purpose == "fine-tune" else json.dumps(line)
        files = {"file": ("rows.jsonl", content.encode())}
        ok = (400,) if purpose == "other" else (200,)
        found = self.send(key, "POST", "/v1/files", ok, files=files, data={"purpose": purpose})
        if found.status_code == 200:
            self.files[key].append(found.json()["id"])

    @rule(key=OWNERS, owner=OWNERS, pick=PICKS)
    def delete_file(self, key: str, owner: str, pick: int) -> None:
        if self.files[owner]:
            file = self.files[owner][pick % len(self.files[owner])]
            ok = (200, 409) if key == owner else (404,)
            if self.send(key, "DELETE", f"/v1/files/{file}", ok).status_code == 200:
                self.files[owner].remove(file)

    @rule(key=OWNERS, owner=OWNERS, pick=PICKS)
    def read_file(self, key: str, owner: str, pick: int) -> None:
        if self.files[owner]:
            file = self.files[owner][pick % len(self.files[owner])]
            ok = (200,) if key == owner else (404,)
            self.send(key, "GET", f"/v1/files/{file}/content", ok)

    # ---- jobs and batches

    @rule(key=OWNERS, owner=OWNERS, pick=PICKS)
    def create_job(self, key: str, owner: str, pick: int) -> None:
        if not self.files[owner]:
            return
        file = self.files[owner][pick % len(self.files[owner])]
        body = {"model": _world["base"], "training_file": file}
        ok = (200, 400, 429) if key == owner else (400, 404)
        found = self.send(key, "POST", "/v1/fine_tuning/jobs", ok, json=body)
        if found.status_code == 200:
            self.jobs[key][found.json()["id"]] = "queued"

    @rule(key=OWNERS, owner=OWNERS, pick=PICKS, verb=strategies.sampled_from(["cancel", "pause"]))
    def change_job(self, key: str, owner: str, pick: int, verb: str) -> None:
        if not self.jobs[owner]:
            return
        job = list(self.jobs[owner])[pick % len(self.jobs[owner])]
        ok = (200, 400, 409) if key == owner else (404,)
        found = self.send(key, "POST", f"/v1/fine_tuning/jobs/{job}/{verb}", ok)
        if found.status_code == 200:
            self.jobs[owner][job] = found.json()["status"]

    @rule(key=OWNERS, owner=OWNERS, pick=PICKS)
    def create_batch(self, key: str, owner: str, pick: int) -> None:
        if not self.files[owner]:
            return
        file = self.files[owner][pick % len(self.files[owner])]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions"}
        body["completion_window"] = "24h"
        ok = (200, 400) if key == owner else (400, 404)
        found = self.send(key, "POST", "/v1/batches", ok, json=body)
        if found.status_code == 200:
            self.batches[key].append(found.json()["id"])

    @rule(key=OWNERS, owner=OWNERS, pick=PICKS)
    def read_batch(self, key: str, owner: str, pick: int) -> None:
        if self.batches[owner]:
            batch = self.batches[owner][pick % len(self.batches[owner])]
            self.send(key, "GET", f"/v1/batches/{batch}", (200,) if key == owner else (404,))

    # ---- adapters and answers

    @rule(name=NAMES, owner=strategies.sampled_from(["alice", "bob", None]))
    def load(self, name: str, owner: str | None) -> None:
        body = {"name": name, "folder": name, "owner": owner}
        ok = (400,) if name in self.adapters else (201,)
        if self.send("root", "POST", "/v1/adapters", ok, json=body).status_code == 201:
            self.adapters[name] = owner

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        ok = (200,) if self.adapters.pop(name, "-") != "-" else (404,)
        self.send("root", "DELETE", f"/v1/adapters/{name}", ok)

    @rule(name=NAMES, how=strategies.sampled_from(["load", "replace", "rename", "unload"]))
    def change_with_a_full_disk(self, name: str, how: str) -> None:
        """What is answered with a 5xx has not happened: the invariant sees the same adapters."""
        if (name in self.adapters) == (how == "load"):
            return
        path, body = f"/v1/adapters/{name}", {"folder": "two"}
        sent: dict[str, Any] = {
            "load": ("POST", "/v1/adapters", {"name": name, **body}),
            "replace": ("PUT", path, body),
            "rename": ("POST", f"{path}/rename", {"name": "three"}),
            "unload": ("DELETE", path, None),
        }
        before = _served_as(name)
        with full_disk():
            method, path, body = sent[how]
            self.send("root", method, path, (500, 507), json=body)
        assert _served_as(name) == before and _served_as("three") is None

    @rule(key=OWNERS, name=NAMES)
    def steal(self, key: str, name: str) -> None:
        self.send(key, "DELETE", f"/v1/adapters/{name}", (403,))
        if self.adapters.get(name, "-") != key:
            self.send(key, "DELETE", f"/v1/models/{name}", (403, 404))

    @rule(key=OWNERS, name=NAMES, kind=strategies.sampled_from(["chat", "text", "vectors"]))
    def ask(self, key: str, name: str, kind: str) -> None:
        is_visible = self.adapters.get(name, "-") in (None, key)
        self._ask(key, name, kind, (200,) if is_visible else (404,))

    @rule(key=OWNERS, kind=strategies.sampled_from(["chat", "text", "vectors"]))
    def ask_base(self, key: str, kind: str) -> None:
        self._ask(key, _world["base"], kind, (200,))

    def _ask(self, key: str, model: str, kind: str, ok: tuple[int, ...]) -> None:
        path, body = {
            "chat": ("chat/completions", {"messages": [{"role": "user", "content": "sol"}]}),
            "text": ("completions", {"prompt": "sol"}),
            "vectors": ("embeddings", {"input": ["sol", "luna"]}),
        }[kind]
        limit = {} if kind == "vectors" else {"max_tokens": 3}
        self.send(key, "POST", f"/v1/{path}", ok, json={"model": model, **body, **limit})

    @rule(key=OWNERS)
    def hang_up(self, key: str) -> None:
        body = {"model": _world["base"], "prompt": "sol", "max_tokens": 60, "stream": True}
        headers = {"authorization": f"Bearer key-of-{key}"}
        with _world["http"].stream("POST", "/v1/completions", headers=headers, json=body) as found:
            assert found.status_code == 200
            next(found.iter_lines())

    @rule(key=OWNERS, path=strategies.sampled_from(PATHS), body=strategies.sampled_from(BODIES))
    def malformed(self, key: str, path: str, body: bytes) -> None:
        headers = {"content-type": "application/json"} | {"authorization": f"Bearer key-of-{key}"}
        found = _world["http"].post(path, headers=headers, content=body)
        _world["statuses"][found.status_code] += 1
        assert 400 <= found.status_code < 500, (path, body, found.status_code, found.text)
        assert found.json()["error"]["message"]

    @rule(key=OWNERS, path=strategies.sampled_from(["files", "fine_tuning/jobs", "batches"]))
    def full(self, key: str, path: str) -> None:
        """What is provoked is a 5xx with Retry-After, and leaves nothing behind."""
        if path == "files":
            sent: Any = {
                "files": {"file": ("r.jsonl", ROWS.encode())},
                "data": {"purpose": "fine-tune"},
            }
        elif not self.files[key]:
            return
        elif path == "batches":
            sent = {"json": {"input_file_id": self.files[key][0], "completion_window": "24h"}}
            sent["json"]["endpoint"] = "/v1/completions"
        else:
            sent = {"json": {"model": _world["base"], "training_file": self.files[key][0]}}
        folder = _world["state"].settings.state_dir / "files"
        before = set(folder.iterdir()) if folder.is_dir() else set()
        with full_disk():
            found = self.send(key, "POST", f"/v1/{path}", (500, 507, 400, 429), **sent)
        assert (set(folder.iterdir()) if folder.is_dir() else set()) == before
        assert found.status_code < 500 or found.headers["retry-after"]

    # ---- what holds at any time

    @invariant()
    def each_key_sees_its_own(self) -> None:
        if not hasattr(self, "files"):
            return
        for key in ("alice", "bob"):
            listed = {
                path: {
                    one["id"] for one in self.send(key, "GET", f"/v1/{path}", (200,)).json()["data"]
                }
                for path in ("files?limit=10000", "fine_tuning/jobs?limit=100", "models")
            }
            assert set(self.files[key]) <= listed["files?limit=10000"]
            assert (
                not set(self.files["bob" if key == "alice" else "alice"])
                & listed["files?limit=10000"]
            )
            own = set(self.jobs[key])
            assert len(own) > 90 or own <= listed["fine_tuning/jobs?limit=100"]
            visible = {name for name, owner in self.adapters.items() if owner in (None, key)}
            assert listed["models"] == {_world["base"], *visible}

    def teardown(self) -> None:
        if not hasattr(self, "files"):
            return
        for key in ("alice", "bob"):
            for job, status in self.jobs[key].items():
                found = self.send(key, "GET", f"/v1/fine_tuning/jobs/{job}", (200,)).json()
                assert found["status"] == status
                self.send(key, "POST", f"/v1/fine_tuning/jobs/{job}/cancel", (200, 400, 409))
        for name in self.adapters:
            self.send("root", "DELETE", f"/v1/adapters/{name}", (200,))
        engine = _world["state"].engine
        until(lambda: not engine._live)
        assert engine.alive and not engine._live and not engine._num_live


TestApiMachine = pytest.mark.slow(ApiMachine.TestCase)
TestApiMachine.settings = settings(
    max_examples=HISTORIES,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
