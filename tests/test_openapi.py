"""Our description of the API holds: what is sent by it never breaks the server; and our answers are OpenAI's, by theirs."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from helpers import SHARED
from live import Live, live, make_adapters
from test_jobs import SHORT, until

FEW = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
ASK = [{"role": "user", "content": "say the sol and the luna"}]


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    adapters = make_adapters(tiny, tmp_path_factory.mktemp("adapters"), one={"rank": 4})
    state = tmp_path_factory.mktemp("state")
    with live(
        base=str(tiny), adapters=[adapters], state_dir=state, insecure=True, job_num_threads=1
    ) as running:
        yield running


@pytest.mark.slow
def test_nothing_that_may_be_sent_breaks_the_server(server: Live, chats: Path) -> None:
    """Driven by hand: schemathesis' own pytest plugin (4.32) does not know pytest 9.2. Names are often real ones."""
    with server.http() as http:
        file = http.post(
            "/v1/files",
            files={"file": ("c.jsonl", chats.read_bytes())},
            data={"purpose": "fine-tune"},
        ).json()["id"]
        job = http.post(
            "/v1/fine_tuning/jobs", json={"model": server.state.base_name, "training_file": file}
        ).json()["id"]
    real = {"file_id": file, "job_id": job, "model": "one", "name": "one", "training_file": file}
    statuses: Counter[int] = Counter()
    names = set()

    def answered(case: Any) -> None:
        if case.method != "DELETE":
            for values in (case.path_parameters, case.body):
                if isinstance(values, dict):
                    values |= {name: value for name, value in real.items() if name in values}
        response = case.call(timeout=60)
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert (
                error["message"]
                and error["type"]
                and set(error) == {"message", "type", "param", "code"}
            )

    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in description.get_all_operations():
        operation = found.ok()
        names.add(f"{operation.method.upper()} {operation.path}")
        settings(FEW, max_examples=20)(given(case=operation.as_strategy())(answered))()
    assert {
        "POST /v1/chat/completions",
        "POST /v1/fine_tuning/jobs",
        "PUT /v1/adapters/{name}",
    } <= names and len(names) > 25
    assert {200, 400, 404, 409} <= set(statuses)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}
    ),
    min_size=1,
    max_size=3,
)
PENALTIES = st.floats(-2, 2)
ALLOWED: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "n": st.integers(1, 3),
    "stop": st.lists(TEXTS.filter(bool), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": PENALTIES,
    "frequency_penalty": PENALTIES,
    "logit_bias": st.dictionaries(st.integers(0, 319).map(str), st.floats(-100, 100), max_size=4),
    "top_k": st.integers(0, 400),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 10),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "max_tokens": st.integers(1, 6),
}


@pytest.mark.slow
@settings(FEW, max_examples=60)
@given(
    model=st.sampled_from(["one", "one:0.5", "one:-1,one:2"]),
    messages=MESSAGES,
    values=st.fixed_dictionaries({}, optional=ALLOWED),
    top=st.none() | st.integers(0, 20),
    form=st.sampled_from(["text", "text", "json_object"]),
)
def test_every_value_that_is_allowed_is_answered(
    server: Live, model: str, messages: Any, values: dict[str, Any], top: int | None, form: str
) -> None:
    body = {
        "max_tokens": 4,
        **values,
        "model": model,
        "messages": messages,
        "response_format": {"type": form},
    }
    body |= {} if top is None else {"logprobs": True, "top_logprobs": top}
    with server.http() as http:
        got = http.post("/v1/chat/completions", json=body)
        assert got.status_code == 200, got.text
        assert "error" not in got.text or not body.get("stream") or '"error": {' not in got.text, (
            got.text
        )
        text = {
            "max_tokens": 4,
            **values,
            "model": model,
            "prompt": ["a", messages[0]["content"] or "b"],
            "logprobs": top and top % 6,
        }
        got = http.post("/v1/completions", json=text)
        assert got.status_code == 200, got.text


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
    return {
        "schemas": _with_null(yaml.load(text, Loader=yaml.CSafeLoader)["components"]["schemas"])
    }


def check(theirs: dict[str, Any], name: str, value: Any) -> None:
    """Raise where `value` is not what OpenAI's description calls `name`."""
    Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": theirs}).validate(
        value
    )


@pytest.mark.slow
@pytest.mark.shared
def test_their_description_can_say_no(theirs: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    for name, value in [
        ("Model", {"id": "x"}),
        ("CreateChatCompletionResponse", {"choices": 1}),
        ("OpenAIFile", {}),
    ]:
        with pytest.raises(ValidationError):
            check(theirs, name, value)


@pytest.mark.shared
def test_our_answers_are_theirs(server: Live, theirs: dict[str, Any]) -> None:
    import json

    chat = {
        "model": "one",
        "messages": ASK,
        "max_tokens": 4,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    text = {"model": "one", "prompt": "the sol", "max_tokens": 4, "logprobs": 2}
    with server.http() as http:

        def events(path: str, body: dict[str, Any]) -> list[Any]:
            told = http.post(
                path, json=body | {"stream": True, "stream_options": {"include_usage": True}}
            ).text.split("\n\n")
            return [json.loads(line[6:]) for line in told if line and line != "data: [DONE]"]

        check(
            theirs,
            "CreateChatCompletionResponse",
            http.post("/v1/chat/completions", json=chat).json(),
        )
        check(
            theirs,
            "CreateChatCompletionResponse",
            http.post(
                "/v1/chat/completions", json=chat | {"logprobs": False, "top_logprobs": None}
            ).json(),
        )
        chunks = events("/v1/chat/completions", chat)
        assert len(chunks) > 6
        for chunk in chunks:
            check(theirs, "CreateChatCompletionStreamResponse", chunk)
        check(theirs, "CreateCompletionResponse", http.post("/v1/completions", json=text).json())
        check(
            theirs,
            "CreateEmbeddingResponse",
            http.post("/v1/embeddings", json={"model": "one", "input": "the sol"}).json(),
        )
        models = http.get("/v1/models").json()
        check(theirs, "ListModelsResponse", models)
        check(theirs, "Model", http.get("/v1/models/one").json())
        check(theirs, "ErrorResponse", http.get("/v1/models/nobody").json())


@pytest.mark.slow
@pytest.mark.shared
def test_our_jobs_are_theirs(server: Live, theirs: dict[str, Any], chats: Path) -> None:
    with server.http() as http:
        file = http.post(
            "/v1/files",
            files={"file": ("c.jsonl", chats.read_bytes())},
            data={"purpose": "fine-tune"},
        ).json()
        check(theirs, "OpenAIFile", file)
        check(theirs, "ListFilesResponse", http.get("/v1/files").json())
        body = {
            "model": server.state.base_name,
            "training_file": file["id"],
            "seed": 1,
            "metadata": {"a": "b"},
            "afina": SHORT,
        }
        job = http.post("/v1/fine_tuning/jobs", json=body).json()
        check(theirs, "FineTuningJob", job)
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        until(lambda: http.get(path).json()["status"] == "succeeded")
        check(theirs, "FineTuningJob", http.get(path).json())
        check(
            theirs, "ListPaginatedFineTuningJobsResponse", http.get("/v1/fine_tuning/jobs").json()
        )
        told = http.get(f"{path}/events").json()
        assert len(told["data"]) >= 5
        check(theirs, "ListFineTuningJobEventsResponse", told)
        kept = http.get(f"{path}/checkpoints").json()
        assert kept["data"]
        check(theirs, "ListFineTuningJobCheckpointsResponse", kept)
        assert http.get(f"{path}/checkpoints", params={"limit": 1}).json()["has_more"] == (
            len(kept["data"]) > 1
        )
        check(theirs, "DeleteFileResponse", http.delete(f"/v1/files/{file['id']}").json())
