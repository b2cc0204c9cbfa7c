"""Work is bounded before it begins, and shared evenly between keys."""

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from afina.engine.engine import Engine, EngineConfig
from afina.engine.request import GenerationRequest, OutputChunk, SamplingParams
from afina.errors import BusyError, DataError, SettingsError
from afina.models.loading import load_base
from afina.objectives.graders import GraderTemplate, parse_grader
from afina.server.connections import BoundedProtocol
from afina.server.fair_pool import FairThreadPool
from afina.server.jobs.bounded import BoundedProcess
from afina.server.startup import AdapterFolders
from afina.server.supervisor import Supervisor
from afina.server.text_limit import count_characters
from live import KEYS, Live, live, make_adapters

ASK: list[Any] = [{"role": "user", "content": "say the sol and the luna " * 3}]


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("state")
    (folder / "keys.yaml").write_text(KEYS)
    adapters = make_adapters(tiny, tmp_path_factory.mktemp("adapters"), one={"rank": 4})
    (adapters / "broken").mkdir()
    (adapters / "broken" / "adapter_config.json").write_text('{"peft_type": 3}')
    with live(
        base=str(tiny),
        adapters=[adapters, folder / "nowhere"],
        state_dir=folder,
        api_key_file=folder / "keys.yaml",
        max_requests_per_key=8,
        max_training_jobs=0,
        max_stored_gb_per_key=1e-6,
        max_jobs_per_key=1,
    ) as running:
        yield running


# ---- texts, bodies, connections


@pytest.mark.slow
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(type(server.state.renderer), "prompt", never)
    text = "the sea " * (server.state.text_limit.characters // 8 + 1)
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/completions": {"prompt": ["a", text]},
        "/v1/embeddings": {"input": text},
        "/tokenize": {"prompt": text},
    }
    with server.http("key-of-alice") as http:
        for path, body in bodies.items():
            got = http.post(path, json={"model": server.state.base_name, **body})
            assert got.status_code == 400, (path, got.text[:200])
            assert got.json()["error"]["code"] == "context_length_exceeded"
            assert len(got.text) < 500


def test_all_texts_of_a_body_count() -> None:
    assert count_characters({"a": ["bc", {"d": "ef"}], "g": 1}, 100) == 7
    assert count_characters(["x" * 50, "y" * 50, "z" * 50], 60) <= 100


@pytest.mark.parametrize("body", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/fine_tuning/jobs"])
def test_json_that_is_nested_too_deep(server: Live, path: str, body: str) -> None:
    with server.http("key-of-alice") as http:
        got = http.post(path, content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400 and "levels" in got.json()["error"]["message"]


DEEP = '{"a":' * 5000 + "1" + "}" * 5000
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": DEEP}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "guided_json": DEEP}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": "[" * 5000}}),
        ("/v1/chat/completions", {"messages": ASK, "guided_json": DEEP}),
        ("/v1/chat/completions", {"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL]}]}),
    ],
)
def test_json_in_a_text_that_is_nested_too_deep(
    server: Live, path: str, body: dict[str, Any]
) -> None:
    with server.http("key-of-alice") as http:
        got = http.post(path, json={"model": server.state.base_name, "max_tokens": 1, **body})
    assert got.status_code == 400, got.text


def test_connections_without_a_request_end_and_never_fill_the_server(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedProtocol, "max_connections", 4)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    idle = [socket.create_connection(address) for _ in range(12)]
    for one in idle:
        one.sendall(b"GET /healthz HTTP/1.1\r\n")
    with server.http() as http:
        assert http.get("/healthz").status_code == 200
    idle[0].settimeout(10)
    with suppress(ConnectionError):  # the oldest was closed for the others
        assert idle[0].recv(1) == b""
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.2)
    late = socket.create_connection(address)
    late.settimeout(10)
    late.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b"200" in late.recv(4096)
    late.sendall(b"GET /heal")  # half a head, on a connection that was used before
    with suppress(ConnectionError):
        while late.recv(4096):
            pass
    for one in [*idle, late]:
        one.close()


def test_sequences_are_counted_and_not_requests(server: Live) -> None:
    body = {"model": server.state.base_name, "max_tokens": 1}
    with server.http("key-of-alice") as http:
        for path, more, status in [
            ("/v1/completions", {"prompt": ["sol"] * 8}, 200),
            ("/v1/completions", {"prompt": ["sol"] * 9}, 429),
            ("/v1/completions", {"prompt": ["sol"] * 3, "n": 3}, 429),
            ("/v1/chat/completions", {"messages": ASK, "n": 9}, 429),
        ]:
            got = http.post(path, json=body | more)
            assert got.status_code == status, got.text
        many = {"model": server.state.base_name, "input": ["sol"] * 9}
        assert http.post("/v1/embeddings", json=many).status_code == 429


# ---- turns


def test_a_client_leaves_threads_to_others_and_waits_behind_them() -> None:
    pool, order, gate = FairThreadPool(3, "test"), [], threading.Event()

    def task(name: str) -> str:
        gate.wait(250)
        order.append(name)
        return name

    async def run() -> list[Any]:
        flood = [asyncio.ensure_future(pool.run(lambda: task("a"), "a")) for _ in range(20)]
        await asyncio.sleep(0.05)
        flood[-1].cancel()
        other = asyncio.ensure_future(pool.run(lambda: "b", "b"))
        assert await other == "b" and not order  # a third thread was left for it
        gate.set()
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 / 0, "b")
        return await asyncio.gather(*flood, return_exceptions=True)

    results = asyncio.run(run())
    assert results[:-1] == ["a"] * 19 and len(order) == 19
    pool.close()
    with pytest.raises(BusyError):
        asyncio.run(pool.run(lambda: 1, "a"))


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return Engine(load_base(str(tiny)), EngineConfig(max_num_batched_tokens=128, max_num_seqs=8))


@pytest.mark.slow
def test_one_chat_beside_a_thousand_sequences(engine: Engine) -> None:
    """The steps until the first token of one chat, beside a key that fills the queue."""
    flood, chat = tuple(range(10, 74)), (5, 6, 9, 12)
    long = SamplingParams(60, ignore_eos=True)

    def steps_of_chat(client: str) -> list[int]:
        seen: list[int] = []
        before = engine.steps
        request = GenerationRequest(chat, SamplingParams(4, ignore_eos=True), client=client)
        handle = engine.add_request(request, lambda chunk: seen.append(engine.steps - before))
        while engine.is_live(handle):
            engine.step()
        return seen

    alone = steps_of_chat("key b")
    handles = [
        engine.add_request(GenerationRequest(flood, long, client="key a"), lambda chunk: None)
        for _ in range(1024)
    ]
    for _ in range(5):
        engine.step()
    beside = steps_of_chat("key b")
    assert beside[0] <= alone[0] + 2 and beside[-1] <= alone[-1] + 4
    while engine._num_live["key a"] < 1024 + 8:
        engine.add_request(GenerationRequest(flood, long, client="key a"), lambda chunk: None)
    with pytest.raises(BusyError):
        engine.add_request(GenerationRequest(flood, long, client="key a"), lambda chunk: None)
    assert steps_of_chat("key c")[0] <= alone[0] + 2  # its own queue is not full
    for handle in handles:
        engine.abort(handle)
    engine._end_all()
    engine.handle_messages()
    assert not engine.scheduler.running and not engine._num_live


@pytest.mark.slow
def test_two_clients_share_evenly_whatever_they_name(engine: Engine) -> None:
    tokens = {"a": 0, "b": 0}

    def count(client: str) -> Any:
        def listen(chunk: OutputChunk) -> None:
            tokens[client] += len(chunk.token_ids)

        return listen

    for number in range(64):
        for client, copies in (("a", 3), ("b", 1)):
            for _ in range(copies if number < 40 else 1):
                request = GenerationRequest(
                    tuple(range(10 + number, 40 + number)),
                    SamplingParams(12, ignore_eos=True),
                    client=client,
                )
                engine.add_request(request, count(client))
    for _ in range(90):
        engine.step()
    assert min(tokens.values()) > 0.8 * max(tokens.values())
    engine._end_all()


@pytest.mark.slow
def test_what_another_key_has_sent_is_not_told(server: Live) -> None:
    body = {"model": server.state.base_name, "messages": ASK, "max_tokens": 1, "temperature": 0}

    def cached(key: str) -> int:
        with server.http(key) as http:
            usage = http.post("/v1/chat/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("key-of-alice") == 0 and cached("key-of-alice") >= 16
    assert cached("key-of-bob") == 0 and cached("key-of-bob") >= 16
    settings = server.state.settings
    server.state.settings = settings.model_copy(update={"share_prefix_cache": True})
    try:
        reused = server.state.engine.reused
        assert cached("key-of-alice") == 0 and cached("key-of-bob") == 0
        assert cached("key-of-bob") >= 16 and server.state.engine.reused > reused
    finally:
        server.state.settings = settings


# ---- graders


def test_templates_are_read_in_linear_time_and_filled_within_a_bound() -> None:
    begin = time.process_time()
    for text in ("{{" * 500_000, "{{ }" * 200_000, "}}{{" * 200_000 + "}}"):
        with suppress(SettingsError):
            GraderTemplate.of(text, "x")
    assert time.process_time() - begin < 5.0  # 139 s for 40,000 openings when it was quadratic
    template = GraderTemplate.of("{{ item.x }}" * 100, "x")
    assert template.fill({"item": {"x": "ab"}}) == "ab" * 100
    with pytest.raises(DataError, match="filled template"):
        template.fill({"item": {"x": "a" * 100_000}})
    same = parse_grader(
        {
            "type": "string_check",
            "name": "n",
            "input": "a{{ item.x }}b{{sample.output_text}}c",
            "reference": "a1b2c",
            "operation": "eq",
        },
        False,
    )
    assert same.grade("2", {"x": 1})[0] == 1.0


@pytest.mark.parametrize("how", ["time", "killed", "memory"])
def test_a_process_of_a_grader_ends(how: str) -> None:
    code = {
        "time": "import time; time.sleep(600)",
        "killed": "import time; time.sleep(600)",
        "memory": "x = bytearray(1 << 30); print(len(x))",
    }[how]
    process = BoundedProcess(
        (sys.executable, "-c", code), "", 250 if how != "time" else 0.3, 1 << 28
    )
    if how == "killed":
        threading.Timer(0.3, process.kill).start()
    begin = time.monotonic()
    status, _, log = process.run()
    assert time.monotonic() - begin < 250
    assert status != 0 and (how != "memory" or "MemoryError" in log)
    process.kill()
    assert process.run() == (None, "", "")


# ---- storage and jobs


def test_a_key_stores_so_much_and_has_so_many_jobs(server: Live) -> None:
    rows = "".join(json.dumps({"prompt": f"{n}", "completion": "sol"}) + "\n" for n in range(8))
    with server.http("key-of-alice") as http:

        def upload(text: str) -> Any:
            files = {"file": ("rows.jsonl", text.encode())}
            return http.post("/v1/files", files=files, data={"purpose": "fine-tune"})

        first = upload(rows)
        assert first.status_code == 200
        full = upload(rows * 4)
        assert full.status_code == 413 and full.json()["error"]["code"] == "quota_exceeded"
        body = {"model": server.state.base_name, "training_file": first.json()["id"]}
        once = {"idempotency-key": "k1"}
        made = http.post("/v1/fine_tuning/jobs", json=body, headers=once)
        again = http.post("/v1/fine_tuning/jobs", json=body, headers=once)
        assert made.status_code == again.status_code == 200, made.text
        assert made.json()["id"] == again.json()["id"]
        other = http.post("/v1/fine_tuning/jobs", json=body | {"seed": 5}, headers=once)
        assert other.status_code == 409
        more = http.post("/v1/fine_tuning/jobs", json=body)
        assert more.status_code == 429 and more.json()["error"]["code"] == "too_many_jobs"
        assert http.post(f"/v1/fine_tuning/jobs/{made.json()['id']}/cancel").status_code == 200
        assert http.delete(f"/v1/files/{first.json()['id']}").status_code == 200
        assert upload(rows * 3).status_code == 200


# ---- start and restart


def test_a_folder_that_fails_keeps_nothing_from_starting(
    server: Live, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    registry = server.state.engine.registry
    assert [entry.name for entry in registry.list_adapters()] == ["one"]

    def broken(*_: Any) -> Any:
        raise RecursionError("of one adapter")

    registry.remove("one")
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_read", broken)
        AdapterFolders(server.state).register_all()
    assert registry.list_adapters() == []
    assert server.state.unserved["one"].reason == "its files cannot be read"
    AdapterFolders(server.state).register_all()
    assert "one" not in server.state.unserved
    assert [entry.name for entry in registry.list_adapters()] == ["one"]


def test_a_server_that_ends_by_itself_is_started_again(tmp_path: Path) -> None:
    count = tmp_path / "starts"
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); n = len(p.read_text()) if p.exists() "
        "else 0; p.write_text('x' * (n + 1)); assert sys.stdin.readline() == 'settings\\n'; "
        "sys.exit(0 if n == 2 else 70)"
    )
    supervisor = Supervisor((sys.executable, "-c", code, str(count)), "settings", 0.01)
    assert supervisor.run() == 0 and count.read_text() == "xxx"
    wrong = Supervisor((sys.executable, "-c", "import sys; sys.exit(2)"), "settings", 0.01)
    assert wrong.run() == 2
