"""Our description of the API holds: what is sent by it never breaks the server; and our answers are OpenAI's, by theirs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator

from helpers import SHARED
from live import Live, live, make_adapters
from test_jobs import SHORT, until

ASK = [{"role": "user", "content": "say the sol and the luna"}]


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    adapters = make_adapters(tiny, tmp_path_factory.mktemp("adapters"), one={"rank": 4})
    state = tmp_path_factory.mktemp("state")
    with live(base=str(tiny), adapters=[adapters], state=state, insecure=True, job_threads=1, jobs=1) as running:
        yield running


def answered(case: Any) -> None:
    """Send one case; raise where the answer is no answer."""
    response = case.call(timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and error["type"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_nothing_that_may_be_sent_breaks_the_server(server: Live) -> None:
    """Driven by hand: schemathesis' own pytest plugin (4.32) does not know pytest 9.2."""
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    names = set()
    for found in description.get_all_operations():
        operation = found.ok()
        names.add(f"{operation.method.upper()} {operation.path}")
        send = given(case=operation.as_strategy())(answered)
        settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)(
            send
        )()
    assert {"POST /v1/chat/completions", "POST /v1/fine_tuning/jobs", "PUT /v1/adapters/{name}"} <= names and len(names) > 25


# ---- OpenAI's own description


def _with_null(value: Any) -> Any:
    """`nullable` as JSON schema has it; examples and the like are left out."""
    if isinstance(value, list):
        return [_with_null(item) for item in value]
    if not isinstance(value, dict):
        return value
    plain = {name: _with_null(item) for name, item in value.items() if name != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if value.get("nullable") is True else plain


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    text = (SHARED / "data" / "openapi" / "openapi.yaml").read_text(encoding="utf-8")
    return {"schemas": _with_null(yaml.load(text, Loader=yaml.CSafeLoader)["components"]["schemas"])}


def check(theirs: dict[str, Any], name: str, value: Any) -> None:
    """Raise where `value` is not what OpenAI's description calls `name`."""
    Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": theirs}).validate(value)


@pytest.mark.shared
def test_their_description_can_say_no(theirs: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    for name, value in [("Model", {"id": "x"}), ("CreateChatCompletionResponse", {"choices": 1}), ("OpenAIFile", {})]:
        with pytest.raises(ValidationError):
            check(theirs, name, value)


@pytest.mark.shared
def test_our_answers_are_theirs(server: Live, theirs: dict[str, Any]) -> None:
    import json

    chat = {"model": "one", "messages": ASK, "max_tokens": 4, "n": 2, "logprobs": True, "top_logprobs": 2}
    text = {"model": "one", "prompt": "the sol", "max_tokens": 4, "logprobs": 2}
    with server.http() as http:

        def events(path: str, body: dict[str, Any]) -> list[Any]:
            told = http.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text.split("\n\n")
            return [json.loads(line[6:]) for line in told if line and line != "data: [DONE]"]

        check(theirs, "CreateChatCompletionResponse", http.post("/v1/chat/completions", json=chat).json())
        check(
            theirs,
            "CreateChatCompletionResponse",
            http.post("/v1/chat/completions", json=chat | {"logprobs": False, "top_logprobs": None}).json(),
        )
        chunks = events("/v1/chat/completions", chat)
        assert len(chunks) > 6
        for chunk in chunks:
            check(theirs, "CreateChatCompletionStreamResponse", chunk)
        check(theirs, "CreateCompletionResponse", http.post("/v1/completions", json=text).json())
        check(theirs, "CreateEmbeddingResponse", http.post("/v1/embeddings", json={"model": "one", "input": "the sol"}).json())
        models = http.get("/v1/models").json()
        check(theirs, "ListModelsResponse", models)
        check(theirs, "Model", http.get("/v1/models/one").json())
        check(theirs, "ErrorResponse", http.get("/v1/models/nobody").json())


@pytest.mark.shared
def test_our_jobs_are_theirs(server: Live, theirs: dict[str, Any], chats: Path) -> None:
    with server.http() as http:
        file = http.post("/v1/files", files={"file": ("c.jsonl", chats.read_bytes())}, data={"purpose": "fine-tune"}).json()
        check(theirs, "OpenAIFile", file)
        check(theirs, "ListFilesResponse", http.get("/v1/files").json())
        body = {"model": server.state.base_name, "training_file": file["id"], "seed": 1, "metadata": {"a": "b"}, "afina": SHORT}
        job = http.post("/v1/fine_tuning/jobs", json=body).json()
        check(theirs, "FineTuningJob", job)
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        until(lambda: http.get(path).json()["status"] == "succeeded")
        check(theirs, "FineTuningJob", http.get(path).json())
        check(theirs, "ListPaginatedFineTuningJobsResponse", http.get("/v1/fine_tuning/jobs").json())
        told = http.get(f"{path}/events").json()
        assert len(told["data"]) >= 5
        check(theirs, "ListFineTuningJobEventsResponse", told)
        kept = http.get(f"{path}/checkpoints").json()
        assert kept["data"]
        check(theirs, "ListFineTuningJobCheckpointsResponse", kept)
        assert http.get(f"{path}/checkpoints", params={"limit": 1}).json()["has_more"] == (len(kept["data"]) > 1)
        check(theirs, "DeleteFileResponse", http.delete(f"/v1/files/{file['id']}").json())
