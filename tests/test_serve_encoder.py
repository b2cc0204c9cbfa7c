"""Served encoders: classifiers of different classes in one batch, vectors, and documents in order."""

import base64
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from afina.adapters.attach import detach
from afina.adapters.saving import save_adapter
from afina.engine.encoder_engine import EncoderEngine
from afina.engine.request import AdapterWeight
from afina.errors import AdapterError, AfinaError, DataError, SettingsError
from afina.evaluation.generate import generate
from afina.models.classifier import load_classifier
from afina.models.encoder import EMBEDDING_KEY, load_encoder
from afina.models.encoder_views import load_encoder_views
from afina.server.serve import build_server
from afina.settings import ServeSettings
from afina.training.train import train
from helpers import put, write_rows
from live import KEYS, Live, live
from test_classes import encoder, words  # noqa: F401
from test_jobs import ended

TEXTS = ["what a great film this is", "awful", "a boring song this is what a trip", "lovely meal"]
LABELS = {"sent": ("bad", "good"), "topic": ("book", "film", "meal"), "value": ("value",)}
DPO = {"type": "dpo"}
PAIRS = [(one, other) for one in TEXTS for other in TEXTS]
TRAINED: dict[str, list[dict[str, Any]]] = {
    "rerank": [
        {"query": one, "passage": other, "label": int(one == other)} for one, other in PAIRS
    ],
    "embed": [{"anchor": text, "positive": text + " song"} for text in TEXTS],
    "tag": [{"tokens": text.split(), "tags": [0] * len(text.split())} for text in TEXTS] * 3,
    "mlm": [{"text": text} for text in TEXTS] * 3,
}
TARGETS = {"sent": "lora", "topic": "dora", "value": "full"}


@pytest.fixture(scope="module")
def runs(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Runs of random adapters: three classifiers with other heads and methods, one of embeddings."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, labels) in enumerate(LABELS.items(), start=1):
        task = "regression" if name == "value" else "classes"
        base = load_classifier(str(encoder), labels, False, task=task)
        heads = base.new_modules
        spec: dict[str, Any] = {"rank": 4} if TARGETS[name] != "full" else {}
        adapter = put(
            base, seed=seed, method=TARGETS[name], layers=[0], modules_to_save=heads, **spec
        )
        data = {"labels": list(labels), "task": task, "format": "text"}
        save_adapter(adapter, base, folder / name / "adapter", {"data": data})
        record = {"format_version": 2, "objective": "classify", "data": data, "settings": {}}
        (folder / name / "run.json").write_text(json.dumps(record))
    vectors = load_encoder(str(encoder))
    adapter = put(vectors, seed=9, rank=4)
    about = {EMBEDDING_KEY: vectors.embedding.record()}
    save_adapter(adapter, vectors, folder / "near" / "adapter", about)
    detach(vectors.model, adapter)
    return folder


@pytest.fixture(scope="module")
def server(
    encoder: Path,  # noqa: F811
    runs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    state = tmp_path_factory.mktemp("state")
    (state / "keys.yaml").write_text(KEYS)
    with live(
        base=str(encoder), adapters=[runs], state_dir=state, api_key_file=state / "keys.yaml"
    ) as running:
        yield running


def post(server: Live, path: str, body: dict[str, Any], key: str = "key-of-alice") -> Any:
    with server.http(key) as http:
        return http.post(path, json=body)


@pytest.fixture(scope="module")
def engine(encoder: Path, runs: Path) -> Iterator[EncoderEngine]:  # noqa: F811
    made = EncoderEngine(load_encoder_views(ServeSettings(base=str(encoder), dtype="float32")))
    for name in (*LABELS, "near"):
        made.registry.add(name, runs / name)
    yield made
    made.stop()


def submit(engine: EncoderEngine, name: str, texts: list[str], client: str = "") -> Any:
    entry = engine.registry.get(name)
    adapters = (AdapterWeight(entry.hash),) if entry else ()
    is_embedding = name in ("near", "")
    view = engine.view(adapters, is_embedding)
    rows = [view.encode(text) for text in texts]
    return engine.submit(rows, adapters, is_embedding=is_embedding, client=client)


@pytest.mark.slow
def test_rows_of_all_classifiers_share_a_batch_and_equal_those_of_each_alone(
    engine: EncoderEngine,
) -> None:
    alone = {}
    for name in (*LABELS, "near", ""):
        futures = [submit(engine, name, [text]) for text in TEXTS]
        while not all(future.done() for future in futures):
            engine.step()
        alone[name] = [future.result()[0] for future in futures]
    steps = engine.steps
    together = {name: submit(engine, name, TEXTS, name) for name in (*LABELS, "near", "")}
    while not all(future.done() for future in together.values()):
        engine.step()
    assert engine.steps - steps == 2  # one of scores, one of vectors
    for name, future in together.items():
        for found, expected in zip(future.result(), alone[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [len(alone[name][0]) for name in LABELS] == [2, 3, 1]


def test_one_adapter_s_error_and_one_client_s_rows_leave_others_alone(
    engine: EncoderEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine._forward
    bad = engine.registry.get("topic").hash  # type: ignore[union-attr]

    def broken(batch: list[Any]) -> list[torch.Tensor]:
        if any(part.adapter == bad for row in batch for part in row.request.adapters):
            raise RuntimeError("broken")
        return forward(batch)

    monkeypatch.setattr(engine, "_forward", broken)
    many = submit(engine, "sent", TEXTS * 40, "many")
    few, failing = submit(engine, "sent", TEXTS[:1], "few"), submit(engine, "topic", TEXTS, "many")
    cancelled = submit(engine, "sent", TEXTS, "gone")
    cancelled.cancel()
    engine.step()
    assert few.done() and not many.done()  # a client with 160 rows does not hold up another
    while not many.done() or not failing.done():
        engine.step()
    with pytest.raises(AfinaError, match="could not be computed"):
        failing.result()
    assert len(many.result()) == 160
    assert not engine._queues and not engine._num_live and not engine._live


def test_adapters_leave_the_layers_for_others(encoder: Path, runs: Path) -> None:  # noqa: F811
    engine = EncoderEngine(load_encoder_views(ServeSettings(base=str(encoder), dtype="float32")))
    engine._attached.max_bytes = 1
    found = []
    for name in ("sent", "topic", "sent"):
        if engine.registry.get(name) is None:
            engine.registry.add(name, runs / name)
        future = submit(engine, name, TEXTS[:1])
        engine.step()
        found.append(future.result()[0])
    assert len(engine._attached) == 1 and engine._attached.evictions >= 2
    torch.testing.assert_close(found[0], found[2])
    engine.registry.remove("sent")
    engine.step()
    with pytest.raises(AdapterError, match="removed|no adapter"):
        submit(engine, "sent", TEXTS) if engine.registry.get("sent") else engine.registry.view_of(
            ""
        )
    engine.stop()


def test_what_cannot_be_computed_is_refused(engine: EncoderEngine) -> None:
    sent, near = (engine.registry.get(name) for name in ("sent", "near"))
    assert sent and near
    rows = [[2, 5, 3]]
    with pytest.raises(AdapterError, match="alone, with weight 1"):
        engine.submit(rows, [AdapterWeight(sent.hash, 0.5)], is_embedding=False)
    with pytest.raises(AdapterError, match="is a classifier"):
        engine.submit(rows, [AdapterWeight(sent.hash)], is_embedding=True)
    with pytest.raises(AdapterError, match="for embeddings"):
        engine.submit(rows, [AdapterWeight(near.hash)], is_embedding=False)
    with pytest.raises(AdapterError, match="no classes"):
        engine.submit(rows, [], is_embedding=False)
    with pytest.raises(DataError, match="33 tokens"):
        engine.submit([[2] * 33], [AdapterWeight(sent.hash)], is_embedding=False)


@pytest.mark.slow
def test_served_classes_are_those_of_afina_generate(server: Live, runs: Path) -> None:
    for name, labels in LABELS.items():
        answers = generate(TEXTS, adapter=runs / name, dtype="float32")["answers"]
        found = post(server, "/v1/classify", {"model": name, "input": TEXTS}).json()
        assert [one["label"] for one in found["data"]] == [one["text"] for one in answers]
        assert {one["num_classes"] for one in found["data"]} == {len(labels)}
        if name != "value":
            shares = [max(one["probs"]) for one in found["data"]]
            assert shares == pytest.approx([one["share"] for one in answers], abs=1e-5)
    raw = {"model": "sent", "input": TEXTS[0], "use_activation": False}
    scores = torch.tensor(post(server, "/v1/classify", raw).json()["data"][0]["probs"])
    probs = post(server, "/v1/classify", raw | {"use_activation": True}).json()["data"][0]["probs"]
    torch.testing.assert_close(scores.softmax(-1), torch.tensor(probs), rtol=1e-4, atol=1e-5)


def test_vectors_are_the_encoder_s_own(server: Live, encoder: Path) -> None:  # noqa: F811
    own = load_encoder(str(encoder), dtype="float32")
    expected = own.embed(own.batch([own.encode(text) for text in TEXTS]))
    client = server.client("key-of-bob")
    model = server.state.base_name
    found = client.embeddings.create(model=model, input=TEXTS)
    torch.testing.assert_close(
        torch.tensor([one.embedding for one in found.data]), expected, rtol=1e-4, atol=1e-5
    )
    body = {"model": model, "input": TEXTS[0], "encoding_format": "base64"}
    raw = base64.b64decode(post(server, "/v1/embeddings", body).json()["data"][0]["embedding"])
    assert list(struct.unpack("<32f", raw)) == pytest.approx(expected[0].tolist(), abs=1e-5)
    near = client.embeddings.create(model="near", input=TEXTS[0]).data[0].embedding
    assert torch.tensor(near).norm() == pytest.approx(1.0, abs=1e-5)
    assert (torch.tensor(near) - expected[0]).norm() > 0.01


def test_tokens_are_those_that_are_computed(server: Live) -> None:
    model, text = server.state.base_name, "great [SEP] song"
    tokens = post(server, "/tokenize", {"model": model, "prompt": text}).json()["tokens"]
    used = post(server, "/v1/embeddings", {"model": model, "input": text}).json()["usage"]
    assert len(tokens) == used["prompt_tokens"] and tokens.count(tokens[-1]) == 1


def test_documents_come_by_relevance(server: Live) -> None:
    model = server.state.base_name
    body = {"model": model, "query": TEXTS[0], "documents": [*TEXTS[1:], {"text": TEXTS[0]}]}
    found = post(server, "/v1/rerank", body).json()["results"]
    scores = [one["relevance_score"] for one in found]
    assert found[0]["index"] == 3 and found[0]["document"] == {"text": TEXTS[0]}
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1.0, abs=1e-5)
    few = post(server, "/v1/rerank", body | {"top_n": 2, "return_documents": False}).json()
    assert [one["index"] for one in few["results"]] == [one["index"] for one in found[:2]]
    assert "document" not in few["results"][0]
    one = {"model": "value", "query": TEXTS[0], "documents": TEXTS}
    assert len(post(server, "/v1/rerank", one).json()["results"]) == 4


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/classify", {"model": "none", "input": "a"}, 404, "model"),
        ("/v1/classify", {"model": "near", "input": "a"}, 400, "model"),
        ("/v1/classify", {"model": "sent:0.5", "input": "a"}, 400, "model"),
        ("/v1/classify", {"model": "auto", "input": "a"}, 400, "model"),
        ("/v1/classify", {"model": "sent", "input": "great " * 40}, 400, "input"),
        ("/v1/classify", {"model": "sent", "input": "a" * 100_000}, 400, "input"),
        ("/v1/classify", {"model": "sent", "input": [[9999]]}, 400, "input"),
        ("/v1/classify", {"model": "sent", "input": []}, 400, "input"),
        ("/v1/classify", {"model": "sent", "input": "a", "nothing": 1}, 400, "nothing"),
        ("/v1/embeddings", {"model": "sent", "input": "a"}, 400, "model"),
        ("/v1/embeddings", {"model": "near", "input": "a", "dimensions": 3}, 400, "dimensions"),
        ("/v1/rerank", {"model": "topic", "query": "a", "documents": ["b"]}, 400, "model"),
        ("/v1/rerank", {"model": "near", "query": "a", "documents": []}, 400, "documents"),
        ("/v1/chat/completions", {"model": "sent", "messages": []}, 400, None),
        ("/v1/completions", {"model": "sent", "prompt": "a"}, 400, None),
        ("/v1/responses", {"model": "sent", "input": "a"}, 400, None),
        ("/v1/fine_tuning/jobs", {"model": "sent", "training_file": "f"}, 400, "model"),
        ("/v1/fine_tuning/jobs", {"model": "b", "training_file": "f", "method": DPO}, 400, None),
    ],
)
def test_refusals_name_what_is_wrong(
    server: Live, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    found = post(server, path, body)
    assert (found.status_code, found.json()["error"]["param"]) == (status, param)
    if param is None:
        assert "is an encoder (bert)" in found.json()["error"]["message"]


@pytest.fixture(scope="module")
def trained(server: Live, encoder: Path, runs: Path) -> dict[str, Any]:  # noqa: F811
    """Runs of each objective of encoders, and what the server says when each is loaded."""
    found = {}
    for objective, rows in TRAINED.items():
        file = write_rows(runs / f"{objective}.jsonl", *rows)
        shared: dict[str, Any] = {"base": str(encoder), "max_steps": 2, "learning_rate": 1e-2}
        run = runs / f"run-{objective}"
        train(file, objective=objective, output_dir=run, eval_data=file, device="cpu", **shared)
        with server.http("key-of-root") as http:
            body = {"name": f"by-{objective}", "folder": run.name}
            found[objective] = http.post("/v1/adapters", json=body)
    return found


@pytest.mark.slow
def test_a_served_reranker_orders_as_the_run_does(
    server: Live, runs: Path, trained: dict[str, Any]
) -> None:
    assert trained["rerank"].status_code == 201
    body = {"model": "by-rerank", "query": TEXTS[0], "documents": TEXTS}
    found = post(server, "/v1/rerank", body).json()["results"]
    pairs = [f"{TEXTS[0]}\t{text}" for text in TEXTS]
    alone = generate(pairs, adapter=runs / "run-rerank", dtype="float32")["answers"]
    expected = {number: one["share"] for number, one in enumerate(alone)}
    assert {one["index"]: one["relevance_score"] for one in found} == pytest.approx(
        expected, abs=1e-5
    )
    assert [one["index"] for one in found] == sorted(expected, key=lambda n: -expected[n])
    pair = {"model": "by-rerank", "input": [[TEXTS[0], TEXTS[1]]]}
    [one] = post(server, "/v1/classify", pair).json()["data"]
    assert one["probs"] == pytest.approx([expected[1]], abs=1e-5)


@pytest.mark.slow
def test_served_vectors_are_those_of_the_run(
    server: Live, runs: Path, trained: dict[str, Any]
) -> None:
    assert trained["embed"].status_code == 201
    found = post(server, "/v1/embeddings", {"model": "by-embed", "input": TEXTS}).json()["data"]
    alone = generate(TEXTS, adapter=runs / "run-embed", dtype="float32")["answers"]
    for one, expected in zip(found, alone, strict=True):
        assert one["embedding"] == pytest.approx(expected["embedding"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "why"), [("tag", "each word a tag"), ("mlm", "no classif")])
def test_what_has_no_classes_of_texts_is_not_served(
    trained: dict[str, Any], objective: str, why: str
) -> None:
    assert trained[objective].status_code == 400
    assert why in trained[objective].json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"afina": {"objective": "sft"}}, "afina.objective"),
        ({"afina": {"objective": ["classify"]}}, "afina.objective"),
        ({"afina": {"data": "/etc/passwd"}}, "afina.data"),
        ({"afina": {"columns": 5}}, "afina"),
        ({"hyperparameters": {"batch_size": 4}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 2.0}}, "learning_rate_multiplier"),
    ],
)
def test_jobs_of_an_encoder_that_make_no_sense(
    server: Live, more: dict[str, Any], param: str
) -> None:
    file = {"file": ("rows.csv", b"text,label\n")}
    with server.http("key-of-bob") as http:
        sent = http.post("/v1/files", files=file, data={"purpose": "fine-tune"}).json()["id"]
        body = {"model": server.state.base_name, "training_file": sent, **more}
        error = http.post("/v1/fine_tuning/jobs", json=body).json()["error"]
    assert error["type"] == "invalid_request_error" and param in error["param"]


@pytest.mark.slow
def test_a_job_of_an_encoder_ends_in_a_served_classifier(server: Live) -> None:
    """Rows with other columns, as OpenAI's client uploads them; each in a process that trains."""
    rows = "".join(f"{text},{'ab'[n % 2]},{n}\n" for n, text in enumerate(TEXTS * 5))
    client = server.client("key-of-alice")
    file = client.files.create(
        file=("r.csv", b"said,mood,n\n" + rows.encode()), purpose="fine-tune"
    )
    own = {"columns": {"text": "said", "label": "mood", "n": None}, "max_steps": 4, "eval_steps": 2}
    job = client.fine_tuning.jobs.create(
        model=server.state.base_name, training_file=file.id, extra_body={"afina": own}
    )
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    found = post(server, "/v1/classify", {"model": done.fine_tuned_model, "input": TEXTS}).json()
    assert {one["label"] for one in found["data"]} <= {"a", "b"}
    hidden = {"model": done.fine_tuned_model, "input": "a"}
    assert post(server, "/v1/classify", hidden, "key-of-bob").status_code == 404


@pytest.mark.slow
def test_a_key_sees_its_own_adapters_and_a_broken_one_is_not_served(
    server: Live, runs: Path
) -> None:
    with server.http("key-of-root") as http:
        own = {"name": "mine", "folder": "sent", "owner": "alice"}
        assert http.post("/v1/adapters", json=own).status_code == 201
    body = {"model": "mine", "input": "great"}
    assert post(server, "/v1/classify", body).status_code == 200
    assert post(server, "/v1/classify", body, "key-of-bob").status_code == 404
    assert post(server, "/v1/classify", body, "wrong").status_code == 401
    results: list[Any] = []

    def work() -> None:
        results.append(post(server, "/v1/classify", body).json()["data"][0]["label"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and len(set(results)) == 1


def test_decoder_has_no_classes(tiny: Path, tmp_path: Path) -> None:
    with live(base=str(tiny), state_dir=tmp_path, insecure=True) as running:
        for path in ("/v1/classify", "/v1/rerank"):
            body = {
                "model": running.state.base_name,
                "input": "a",
                "query": "a",
                "documents": ["b"],
            }
            error = post(running, path, body).json()["error"]
            assert "is a language model (llama), and no encoder" in error["message"]


def test_settings_without_effect_on_an_encoder_are_errors(encoder: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = ServeSettings(base=str(encoder), state_dir=tmp_path, chat_template="chatml")
    with pytest.raises(SettingsError, match="chat_template has no effect on an encoder"):
        build_server(settings)
