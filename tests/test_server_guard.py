"""Keys, roots, limits, figures, logs: who may what, and what a server does when it is too much."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from afina.errors import BusyError, SettingsError
from afina.server.auth import APIKeys, Principal
from afina.server.errors import APIError
from afina.server.logs import JsonLines
from afina.server.rate_limits import RateLimiter
from afina.server.serve import _lock_state_dir
from afina.settings import ServeSettings
from helpers import until
from live import KEYS, Live, live, make_adapters

ASK: list[Any] = [{"role": "user", "content": "say the sol and the luna"}]
BODY = {"model": "one", "messages": ASK, "max_tokens": 4}


@pytest.fixture(scope="module")
def roots(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_adapters(
        tiny, tmp_path_factory.mktemp("adapters"), one={"rank": 4}, two={"rank": 8}
    )
    outside = make_adapters(tiny, tmp_path_factory.mktemp("outside"), three={"rank": 2})
    (folder / "link").symlink_to(outside / "three")
    (folder / "inner").mkdir()
    for file in (outside / "three").iterdir():
        (folder / "inner" / file.name).symlink_to(file)
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes(
        (folder / "one" / "adapter_config.json").read_bytes()
    )
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture(scope="module")
def open_server(
    tiny: Path, roots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """No keys: anybody may ask."""
    state = tmp_path_factory.mktemp("state")
    with live(
        base=str(tiny),
        adapters=[roots / "one"],
        state_dir=state,
        max_body_bytes=20_000,
        max_file_bytes=5_000,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def closed_server(
    tiny: Path, roots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """Alice and Bob may ask, root may everything."""
    state = tmp_path_factory.mktemp("state")
    (state / "keys.yaml").write_text(KEYS)
    with live(
        base=str(tiny),
        adapters=[roots / "one", roots / "two"],
        state_dir=state,
        api_key_file=state / "keys.yaml",
        max_requests_per_key=2,
    ) as running:
        yield running


# ---- keys


@pytest.mark.slow
def test_an_open_server_answers_and_changes_nothing_without_its_key(open_server: Live) -> None:
    with open_server.http() as http:
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200
        for method, path in [
            ("GET", "/metrics"),
            ("GET", "/v1/files"),
            ("GET", "/v1/fine_tuning/jobs"),
            ("DELETE", "/v1/adapters/one"),
        ]:
            assert http.request(method, path).status_code == 401, path
        assert http.post("/v1/adapters", json={"name": "x", "folder": "one"}).status_code == 401
        assert (
            http.post(
                "/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"}
            ).status_code
            == 401
        )
        assert http.delete("/v1/models/one").status_code == 401
    assert (open_server.state.settings.state_dir / "admin.key").stat().st_mode & 0o77 == 0
    with open_server.http(open_server.admin) as http:
        assert http.get("/metrics").status_code == 200


@pytest.mark.slow
def test_a_closed_server_wants_a_key(closed_server: Live) -> None:
    for key, status in [(None, 401), ("wrong", 401), ("key-of-alice", 200), ("key-of-root", 200)]:
        with closed_server.http(key) as http:
            assert http.post("/v1/chat/completions", json=BODY).status_code == status
            assert http.get("/v1/models").status_code == status
            assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
            assert (
                http.get("/metrics").status_code
                == {None: 401, "wrong": 401, "key-of-alice": 403, "key-of-root": 200}[key]
            )
    assert (
        httpx2.get(f"{closed_server.url}/v1/models", headers={"api-key": "key-of-bob"}).status_code
        == 200
    )


def test_an_adapter_belongs_to_a_key_or_is_public(closed_server: Live) -> None:
    shelf = closed_server.state.engine.registry
    folder = shelf.get("two").folder
    shelf.add("hers", Path(folder), "alice")
    alice, bob, root = (closed_server.client(f"key-of-{name}") for name in ("alice", "bob", "root"))
    for client, sees in ((alice, True), (bob, False), (root, True)):
        assert ("hers" in [model.id for model in client.models.list()]) is sees
        for model in ("hers", "one:0.5,hers:0.5"):
            if sees:
                assert client.chat.completions.create(
                    model=model, messages=ASK, max_tokens=2
                ).choices
            else:
                with pytest.raises(openai.NotFoundError):
                    client.chat.completions.create(model=model, messages=ASK, max_tokens=2)
    assert (
        closed_server.state.resolve_model(Principal("alice"), "one:0.5,hers:0.5").owner == "alice"
    )
    assert closed_server.state.resolve_model(Principal("alice"), "one").owner == ""
    with pytest.raises(openai.PermissionDeniedError):
        alice.models.delete("one")
    with pytest.raises(openai.NotFoundError):
        bob.models.delete("hers")
    assert alice.models.delete("hers").deleted
    assert shelf.get("hers") is None


def test_keys_in_a_file(tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "keys.yaml"
    hidden = hashlib.sha256(b"secret").hexdigest()
    file.write_text(f"ann: plain\nbert: {{sha256: {hidden}, admin: true}}\n")
    keys = APIKeys(ServeSettings(api_key_file=file, state_dir=tmp_path))
    assert keys.caller({"authorization": "Bearer plain"}) == Principal("ann")
    assert keys.caller({"api-key": "secret"}) == Principal("bert", True)
    with pytest.raises(APIError) as caught:
        keys.caller({"authorization": f"Bearer {hidden}"})
    assert caught.value.status_code == 401
    for wrong in ("ann: {admin: true}", "ann: [1]", "ann: {key: x, role: admin}", "- x"):
        file.write_text(wrong)
        with pytest.raises(SettingsError):
            APIKeys(ServeSettings(api_key_file=file, state_dir=tmp_path))
    assert APIKeys(ServeSettings(insecure=True, state_dir=tmp_path)).caller({}) == Principal(
        None, True
    )
    assert not (tmp_path / "admin.key").exists()


# ---- adapters coming and going


@pytest.mark.slow
def test_adapters_come_change_and_go_while_others_are_asked(open_server: Live, roots: Path) -> None:
    def say(model: str) -> str:
        client = open_server.client()
        return (
            client.chat.completions.create(model=model, messages=ASK, temperature=0, max_tokens=8)
            .choices[0]
            .message.content
            or ""
        )

    state = open_server.state
    place = state.settings.state_dir / "adapters"
    place.mkdir(exist_ok=True)
    for name in ("one", "two"):
        (place / f"{name}-copy").mkdir()
        for file in (roots / name).iterdir():
            (place / f"{name}-copy" / file.name).write_bytes(file.read_bytes())
    one = say("one")
    with open_server.http(open_server.admin) as http:
        made = http.post("/v1/adapters", json={"name": "new", "folder": "one-copy"})
        assert (
            made.status_code == 201 and made.json()["hash"] == state.engine.registry.get("one").hash
        )
        assert say("new") == one
        assert (
            http.post("/v1/adapters", json={"name": "new", "folder": "one-copy"}).status_code == 400
        )
        assert http.put("/v1/adapters/new", json={"folder": "two-copy"}).json()["rank"] == 8
        assert say("new") != one
        assert http.post("/v1/adapters/new/rename", json={"name": "newer"}).json()["id"] == "newer"
        with pytest.raises(openai.NotFoundError):
            say("new")
        assert say("newer") != one
        listed = {entry["id"]: entry for entry in http.get("/v1/adapters").json()["data"]}
        assert (
            set(listed) == {"one", "newer"}
            and listed["newer"]["hits"] >= 1
            and "folder" not in listed["newer"]
        )
        assert http.delete("/v1/adapters/newer").json()["deleted"]
        assert http.delete("/v1/adapters/newer").status_code == 404
        assert http.put("/v1/adapters/newer", json={"folder": "one-copy"}).status_code == 404
        for name in ("auto", "a,b", "a/b", "", state.base_name):
            assert (
                http.post("/v1/adapters", json={"name": name, "folder": "one-copy"}).status_code
                == 400
            )


@pytest.mark.parametrize(
    "folder",
    ["../one", "/etc", "one/../../x", "link", "inner", "pickled", "nowhere", "a\0b", "..\\one", ""],
)
def test_nothing_outside_of_the_roots_is_loaded(
    tiny: Path, roots: Path, tmp_path: Path, folder: str, closed_server: Live
) -> None:
    settings = closed_server.state.settings
    closed_server.state.settings = settings.model_copy(update={"adapters": [roots]})
    try:
        with closed_server.http("key-of-root") as http:
            got = http.post("/v1/adapters", json={"name": "bad", "folder": folder})
    finally:
        closed_server.state.settings = settings
    assert got.status_code == 400 and got.json()["error"]["param"] in ("folder", "name"), got.text
    assert closed_server.state.engine.registry.get("bad") is None


# ---- too much


def test_bodies_that_are_too_long(open_server: Live) -> None:
    long = {**BODY, "messages": [{"role": "user", "content": "x" * 30_000}]}
    with open_server.http(open_server.admin) as http:
        assert http.post("/v1/chat/completions", json=long).status_code == 413

        def pieces() -> Iterator[bytes]:  # no length is told beforehand
            yield from (json.dumps(long).encode()[n : n + 1000] for n in range(0, 30_000, 1000))

        got = http.post(
            "/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}
        )
        assert got.status_code == 413 and got.json()["error"]["code"] == "body_too_long"
        for size, status in ((4_000, 200), (6_000, 413), (200_000, 413)):
            upload = http.post(
                "/v1/files", files={"file": ("a.jsonl", b"x" * size)}, data={"purpose": "fine-tune"}
            )
            assert upload.status_code == status
        assert len(http.get("/v1/files").json()["data"]) == 1
        assert [
            p.stat().st_size for p in (open_server.state.settings.state_dir / "files").iterdir()
        ] == [4_000]


@pytest.mark.slow
def test_a_key_has_so_many_requests_at_once(closed_server: Live) -> None:
    slow = {**BODY, "max_tokens": 100, "ignore_eos": True}
    statuses: list[int] = []

    def ask() -> None:
        with closed_server.http("key-of-alice") as http:
            got = http.post("/v1/chat/completions", json=slow)
            statuses.append(got.status_code)
            if got.status_code == 429:
                assert (
                    int(got.headers["retry-after"]) >= 1
                    and got.json()["error"]["type"] == "rate_limit_error"
                )

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    with closed_server.http("key-of-alice") as http:  # and afterwards it is as before
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200


def test_tokens_a_minute_come_back_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limits, ann, bert = RateLimiter(None, 600), Principal("ann"), Principal("bert")
    with limits.running(ann):
        limits.spend(ann, 700)
    with pytest.raises(APIError) as caught, limits.running(ann):
        pass
    assert caught.value.status_code == 429 and caught.value.retry_after == pytest.approx(10.1)
    with limits.running(bert):
        pass
    now[0] = 10.2
    with limits.running(ann):
        pass
    now[0] = 1000.0
    limits.spend(ann, 601)  # what came back is never more than a minute's
    with pytest.raises(APIError), limits.running(ann):
        pass


def test_a_full_queue_is_503_with_a_time(
    open_server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise BusyError("the queue is full", 7.0)

    with monkeypatch.context() as patch, open_server.http() as http:
        patch.setattr(open_server.state.engine, "add_request", full)
        for stream in (False, True):
            got = http.post("/v1/chat/completions", json={**BODY, "stream": stream})
            assert got.status_code == 503 and got.headers["retry-after"] == "7"


def test_an_answer_that_takes_too_long_is_cancelled(open_server: Live) -> None:
    state, settings = open_server.state, open_server.state.settings
    state.settings = settings.model_copy(update={"request_timeout": 0.05})
    slow = {**BODY, "max_tokens": 150, "ignore_eos": True}
    try:
        with open_server.http() as http:
            got = http.post("/v1/chat/completions", json=slow)
            assert got.status_code == 503 and got.json()["error"]["code"] == "timeout"
            lines = (
                http.post("/v1/chat/completions", json={**slow, "stream": True})
                .text.strip()
                .split("\n\n")
            )
    finally:
        state.settings = settings
    assert json.loads(lines[-2][6:])["error"]["code"] == "timeout" and lines[-1] == "data: [DONE]"
    _until_idle(open_server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_costs_nothing_more(open_server: Live, stream: bool) -> None:
    slow = {**BODY, "max_tokens": 150, "ignore_eos": True, "stream": stream, "n": 4}
    before = open_server.state.engine.stats()["generated_tokens"]
    with open_server.http() as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=slow) as answer:
                assert next(answer.iter_lines()).startswith("data: ")  # and then no more is read
        else:
            with pytest.raises(httpx2.TimeoutException):
                http.post("/v1/chat/completions", json=slow, timeout=0.1)
    _until_idle(open_server)
    assert open_server.state.engine.stats()["generated_tokens"] - before < 4 * 150


def _until_idle(server: Live) -> None:
    stats = server.state.engine.stats
    until(lambda: not stats()["running"] and not stats()["waiting"])


def test_two_servers_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afina.server.serve.LOCK_SECONDS", 0.2)
    first = _lock_state_dir(tmp_path)
    with pytest.raises(SettingsError, match="another server"):
        _lock_state_dir(tmp_path)
    os.close(os.dup(first.fileno()))
    first.close()
    _lock_state_dir(tmp_path).close()


def test_an_engine_that_broke_is_told_and_asked_nothing(
    open_server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, open_server.http() as http:
        patch.setattr(type(open_server.state.engine), "alive", False)
        for path in ("/healthz", "/readyz"):
            assert http.get(path).status_code == 503
        assert http.post("/v1/chat/completions", json=BODY).json()["error"]["code"] == "broken"


# ---- figures and logs


def test_figures_for_each_adapter(open_server: Live) -> None:
    with open_server.http(open_server.admin) as http:
        for _ in range(3):
            http.post("/v1/chat/completions", json=BODY)
        text = http.get("/metrics").text
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name, *sorted(sample.labels.values())] = sample.value
    assert samples["afina_adapter_hits_total", "one"] >= 3
    assert samples["afina_time_to_first_token_seconds_count", "one"] >= 3
    assert samples["afina_completion_tokens_total", "one"] >= 3
    assert (
        sum(
            samples["afina_adapter_state", *sorted(("one", state))]
            for state in ("disk", "host", "device", "merged")
        )
        == 1
    )
    assert samples["afina_http_requests_total", *sorted(("/v1/chat/completions", "200"))] >= 3
    assert ("afina_engine_waiting",) in samples and ("afina_adapter_load_seconds", "one") in samples


def test_a_line_for_each_request_and_nothing_of_what_was_said(
    open_server: Live, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "afina.server"), open_server.http("some-key") as http:
        got = http.post(
            "/v1/chat/completions",
            json={**BODY, "user": "u1", "messages": [{"role": "user", "content": "secret"}]},
        )
        # the line is written once the answer is out, by the server's thread
        records = until(lambda: [r for r in caplog.records if r.getMessage() == "request"])
    line = json.loads(JsonLines().format(records[0]))
    assert (
        line["status"] == 200
        and line["model"] == "one"
        and line["user"] == "u1"
        and line["completion_tokens"] >= 1
    )
    assert (
        line["request"] == got.headers["x-request-id"]
        and line["path"] == "/v1/chat/completions"
        and line["first_token"] > 0
    )
    assert "secret" not in json.dumps(line) and "some-key" not in json.dumps(line)


@pytest.mark.slow
def test_what_nobody_reads_is_refused(open_server: Live) -> None:
    with open_server.http() as http:
        assert http.get("/v1/models", params={"limt": 3}).json()["error"]["param"] == "limt"
        assert http.get("/v1/nothing").status_code == 404
        assert http.get("/v1/chat/completions").status_code == 405
        got = http.post(
            "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
        )
        assert got.status_code == 400 and got.json()["error"]["type"] == "invalid_request_error"


def test_a_locked_database_is_503(open_server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: Any, **__: Any) -> None:
        raise OperationalError("BEGIN IMMEDIATE", {}, Exception("database is locked"))

    monkeypatch.setattr(type(open_server.state.store), "query", locked)
    with open_server.http(open_server.admin) as http:
        found = http.get("/v1/files")
    assert (found.status_code, found.headers["retry-after"]) == (503, "10")
    assert found.json()["error"]["code"] == "database_unavailable"
