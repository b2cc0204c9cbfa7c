"""The server as the stock clients see it: every parameter does what it says, or is refused."""

import json
import math
import re
import struct
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from afina.adapters.active import ActiveAdapters
from afina.adapters.loading import load_adapter
from afina.data.renderer import Renderer
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.engine.routing_profile import PromptEmbedder, build_profile, write_profile
from afina.models.loading import load_base
from conftest import WORDS
from live import Live, live, make_adapters

ASK: list[Any] = [
    {"role": "system", "content": "night"},
    {"role": "user", "content": "say the sol and the luna"},
]


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    specs: dict[str, Any] = {"one": {"rank": 4}, "two": {"rank": 8, "method": "dora"}}
    return make_adapters(tiny, tmp_path_factory.mktemp("adapters"), **specs)


@pytest.fixture(scope="module")
def server(tiny: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(
        base=str(tiny), adapters=[adapters], state_dir=tmp_path_factory.mktemp("state")
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def alone(tiny: Path, adapters: Path) -> Any:
    """What base and adapters say to a prompt without any server, greedily: text."""
    base = load_base(str(tiny))
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    routes = {name: load_adapter(adapters / name, base, name).active for name in ("one", "two")}

    def say(weights: dict[str, float], new: int = 12, messages: Any = ASK) -> str:
        parts = [routes[name].scaled(weight) for name, weight in weights.items()]
        route = ActiveAdapters.combine(parts)
        return generate_completions(
            base, [renderer.prompt(messages)], SamplingParams(new), route, renderer.stop_token_ids
        )[0].text

    say.base, say.renderer = base, renderer  # type: ignore[attr-defined]
    return say


def name_of(server: Live) -> str:
    return server.state.base_name


def greedy(client: openai.OpenAI, model: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=ASK, temperature=0, max_completion_tokens=12, **more
    )


TOOLS: list[Any] = [{"type": "function", "function": {"name": "f"}}]
# terms of the validator, which no client should read
JARGON = re.compile(r"\b(str|int|float|dict|union|extra_forbidden|type=|pydantic|NoneType)\b")


# ---- chat


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("", {}),
        ("one", {"one": 1.0}),
        ("two", {"two": 1.0}),
        ("one:0.7,two:0.3", {"one": 0.7, "two": 0.3}),
        ("one:-0.5", {"one": -0.5}),
    ],
)
def test_an_answer_is_that_of_base_and_adapters_alone(
    server: Live, client: openai.OpenAI, alone: Any, model: str, weights: dict[str, float]
) -> None:
    got = greedy(client, model or name_of(server))
    assert got.choices[0].message.content.strip() == alone(weights)
    assert got.model == (model or name_of(server))
    assert got.usage.prompt_tokens == len(alone.renderer.prompt(ASK))
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_adapters_do_say_something_else(alone: Any) -> None:
    assert len({alone(weights) for weights in ({}, {"one": 1.0}, {"two": 1.0})}) == 3


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = greedy(client, "one")
    chunks = list(greedy(client, "one", stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[
        0
    ].finish_reason
    assert (
        chunks[-1].choices == []
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    assert len(chunks) > 5


def test_n_answers_differ_and_a_seed_brings_them_back(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        got = client.chat.completions.create(
            model="one", messages=ASK, n=3, seed=seed, max_tokens=8
        )
        assert [choice.index for choice in got.choices] == [0, 1, 2]
        return [choice.message.content or "" for choice in got.choices]

    first = ask(7)
    assert ask(7) == first and ask(8) != first and len(set(first)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="one", messages=ASK, n=3, seed=7, max_tokens=8, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_a_stop_text_ends_and_is_not_told(client: openai.OpenAI) -> None:
    whole = greedy(client, "one").choices[0].message.content
    stop = whole[4:6]
    got = greedy(client, "one", stop=[stop, "never said"]).choices[0]
    assert got.message.content == whole[: whole.index(stop)] and got.finish_reason == "stop"


def test_logprobs_are_those_of_the_base(server: Live, client: openai.OpenAI, alone: Any) -> None:
    import torch

    got = greedy(client, name_of(server), logprobs=True, top_logprobs=3).choices[0]
    prompt = alone.renderer.prompt(ASK)
    tokens = torch.tensor(prompt)
    with torch.no_grad():
        expected = alone.base.all_logits(tokens, torch.arange(len(prompt)), (0, len(prompt)))[
            -1
        ].log_softmax(-1)
    first = got.logprobs.content[0]
    values, _ = expected.topk(3)
    assert first.logprob == pytest.approx(values[0].item(), abs=1e-4)
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    said = b"".join(
        bytes(token.bytes or [])
        for token in got.logprobs.content
        if not token.token.startswith("<")
    )
    assert said.decode(errors="replace").strip().startswith((got.message.content or "").strip()[:5])


def test_a_bias_forces_and_forbids(server: Live, client: openai.OpenAI, alone: Any) -> None:
    token = alone.base.tokenizer.convert_tokens_to_ids("x")
    forced = greedy(client, name_of(server), logit_bias={str(token): 100}).choices[0]
    assert forced.message.content == "x" * 12 and forced.finish_reason == "length"


def test_an_answer_satisfies_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "number", "schema": schema, "strict": True},
    }
    for seed in range(3):
        got = client.chat.completions.create(
            model="one", messages=ASK, response_format=form, seed=seed, max_tokens=60
        )
        if got.choices[0].finish_reason == "stop":
            assert set(json.loads(got.choices[0].message.content or "")) == {"n"}
    text = greedy(client, "one", response_format={"type": "json_object"}).choices[0].message.content
    assert text.lstrip().startswith("{")


def test_messages_of_every_shape(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "night"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "say the sol"},
                {"type": "text", "text": " and the luna"},
            ],
        },
    ]
    got = client.chat.completions.create(model="one", messages=parts, temperature=0, max_tokens=12)
    assert got.choices[0].message.content == greedy(client, "one").choices[0].message.content
    again = [*ASK, got.choices[0].message, {"role": "user", "content": "say it again"}]
    assert (
        client.chat.completions.create(
            model="one", messages=again, max_tokens=3
        ).usage.completion_tokens
        <= 3
    )


def test_a_second_question_finds_the_first_ones_prefix(client: openai.OpenAI) -> None:
    long: list[Any] = [
        {
            "role": "user",
            "content": "the sol and the luna and the mar and the pan by the road at night",
        }
    ]
    for _ in range(2):
        got = client.chat.completions.create(model="one", messages=long, max_tokens=2)
    assert got.usage.prompt_tokens_details.cached_tokens > 0


# ---- what is refused


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"logit_bias": {"999999": 1}}, "999999"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    client: openai.OpenAI, values: dict[str, Any], word: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="one", messages=ASK, **values)
    assert word in str(caught.value.body["message"])  # type: ignore[index]
    assert caught.value.type == "invalid_request_error" and caught.value.param
    assert not JARGON.search(str(caught.value.body["message"]))  # type: ignore[index]


def test_what_asks_for_nothing_is_no_reason_to_refuse(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="one",
        messages=ASK,
        max_tokens=2,
        tools=[],
        store=False,
        modalities=["text"],
        user="u",
        service_tier="flex",
        metadata={"run": "1"},
        reasoning_effort="low",
        parallel_tool_calls=False,
        max_completion_tokens=2,
        prompt_cache_key="k",
        extra_body={"top_k": -1, "guided_json": None, "cache_prompt": True},
    )
    assert got.choices
    raw = client.chat.completions.with_raw_response.create(
        model="one",
        messages=[{"role": "user", "name": "kim", "content": "say the sol"}],
        max_tokens=2,
        metadata={"run": "1"},
        verbosity="low",
    )
    assert raw.headers["x-afina-ignored"] == "metadata, verbosity"


def test_who_is_not_there(client: openai.OpenAI) -> None:
    for model in ("nobody", "one:x", "one,nobody", "nobody:0.5", ","):
        with pytest.raises(openai.NotFoundError):
            greedy(client, model)
    with pytest.raises(openai.BadRequestError, match="at most 8"):
        greedy(client, ",".join(["one:0.1"] * 9))


def test_more_than_the_base_reads(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "night " * 300}]
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="192"):
        client.chat.completions.create(model="one", messages=ASK, max_tokens=500)


def test_half_a_surrogate_pair_is_no_text(server: Live) -> None:
    body = b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}'
    with server.http() as http:
        got = http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert got.status_code == 400 and "Unicode" in got.json()["error"]["message"]


# ---- completions, embeddings, models


def test_completions_go_on_with_texts_and_tokens(
    server: Live, client: openai.OpenAI, alone: Any
) -> None:
    texts = ["the sol and", "A bird sat"]
    got = client.completions.create(
        model=name_of(server), prompt=texts, max_tokens=6, temperature=0, n=2, echo=True
    )
    tokens = [alone.renderer.prompt(text, raw=True) for text in texts]
    expected = [
        alone.base.decode(completion.token_ids)
        for completion in generate_completions(alone.base, tokens, SamplingParams(6))
    ]
    assert [c.text for c in got.choices] == [
        t + e for t, e in zip(texts, expected, strict=True) for _ in range(2)
    ]
    assert got.usage.prompt_tokens == sum(map(len, tokens))
    same = client.completions.create(
        model=name_of(server), prompt=tokens, max_tokens=6, temperature=0, logprobs=2
    )
    assert [c.text for c in same.choices] == expected
    told = same.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == 6 and len(told.top_logprobs[0]) == 2
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    stream = client.completions.create(
        model=name_of(server), prompt=tokens, max_tokens=6, temperature=0, stream=True
    )
    pieces = ["", ""]
    for chunk in stream:
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == expected


def test_prompts_have_logprobs_where_they_are_echoed(
    server: Live, client: openai.OpenAI, alone: Any
) -> None:
    """As lm-evaluation-harness scores: nothing of the prefix cache, and no token is returned."""
    import torch

    text = "the sol and the luna went by the road at night " * 4
    tokens = alone.renderer.prompt(text, raw=True)
    with torch.no_grad():
        logits = alone.base.all_logits(
            torch.tensor(tokens), torch.arange(len(tokens)), (0, len(tokens))
        )
    expected = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    for more in ({}, {}, {"stream": True}):  # the second time, the prefix would be cached
        got = client.completions.create(
            model=name_of(server), prompt=text, max_tokens=0, echo=True, logprobs=2, **more
        )
        choice = next(iter(got)).choices[0] if more else got.choices[0]
        told = choice.logprobs
        assert choice.text == text and told.token_logprobs[0] is None
        assert told.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
        assert len(told.tokens) == len(told.text_offset) == len(tokens)
        assert max(told.top_logprobs[1].values()) >= told.token_logprobs[1]
    assert got and choice.finish_reason in (None, "length")


def test_completions_refuse_what_they_cannot_do(client: openai.OpenAI) -> None:
    wrong: list[dict[str, Any]] = [
        {"suffix": "end"},
        {"best_of": 3},
        {"max_tokens": 0},
        {"prompt": [99_999]},
        {"prompt": []},
    ]
    for values in wrong:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "one", "prompt": "the sol", **values})


def test_embeddings_are_vectors_of_length_one(server: Live, client: openai.OpenAI) -> None:
    got = client.embeddings.create(
        model="one", input=["the sol", "the luna", "the sol"], encoding_format="float"
    )
    first, second, third = (item.embedding for item in got.data)
    assert first == pytest.approx(third) and first != pytest.approx(second)
    assert math.hypot(*first) == pytest.approx(1.0, abs=1e-3)
    assert client.embeddings.create(model="one", input="the sol").data[
        0
    ].embedding == pytest.approx(first, abs=1e-6)  # base64
    with server.http() as http:
        body = {"model": "one", "input": "the sol", "encoding_format": "base64"}
        data = b64decode(http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(first, abs=1e-6)
    assert client.embeddings.create(model=name_of(server), input="the sol").data[
        0
    ].embedding != pytest.approx(first)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="one", input="the sol", dimensions=3)


def test_models_are_the_base_and_its_adapters(server: Live, client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {name_of(server), "one", "two"}
    assert models["one"].parent == name_of(server)  # type: ignore[attr-defined]
    assert client.models.retrieve("two").id == "two"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")
    assert "/" not in name_of(server)


# ---- Azure


@pytest.mark.slow
def test_the_stock_client_of_azure(server: Live, client: openai.OpenAI) -> None:
    azure = openai.AzureOpenAI(
        azure_endpoint=server.url, api_version="2024-10-21", api_key="none", max_retries=0
    )
    expected = greedy(client, "one").choices[0].message.content
    assert greedy(azure, "one").choices[0].message.content == expected
    assert (
        "".join(c.choices[0].delta.content or "" for c in greedy(azure, "one", stream=True))
        == expected
    )
    deployed = openai.AzureOpenAI(
        azure_endpoint=server.url,
        azure_deployment="one",
        api_version="2024-10-21",
        api_key="none",
        max_retries=0,
    )
    assert greedy(deployed, "whatever").choices[0].message.content == expected
    assert {model.id for model in azure.models.list()} >= {"one", "two"}
    assert azure.embeddings.create(model="one", input="the sol").data[0].embedding
    newer = openai.OpenAI(
        base_url=f"{server.url}/openai/v1/",
        api_key="none",
        default_query={"api-version": "preview"},
    )
    assert greedy(newer, "one").choices[0].message.content == expected
    with server.http() as http:
        path, body = "/openai/deployments/one/chat/completions", {"messages": ASK, "max_tokens": 2}
        assert http.post(path, json=body).status_code == 400
        assert http.post(path, params={"api-version": "2024-10-21"}, json=body).status_code == 200
        assert http.post("/v1/chat/completions", json=body).json()["error"]["param"] == "model"


# ---- auto


@pytest.mark.slow
def test_auto_says_whom_it_chose_and_why(server: Live, client: openai.OpenAI) -> None:
    state = server.state
    embedding = PromptEmbedder(state.base)
    asked = {"one": "the mar {} and the pan by the road at night {}", "two": "say {} again, say {}"}
    for name, form in asked.items():
        entry = state.engine.registry.get(name)
        assert entry is not None
        prompts = [
            state.base.tokenizer(form.format(a, b))["input_ids"] for a in WORDS for b in WORDS
        ]
        points = build_profile(embedding, prompts)
        assert points is not None
        write_profile(Path(entry.folder), points, embedding.key)
    question = [{"role": "user", "content": "say tree again, say sol"}]
    raw = client.chat.completions.with_raw_response.create(
        model="auto",
        messages=question,
        temperature=0,
        max_completion_tokens=12,  # type: ignore[arg-type]
    )
    assert raw.headers["x-afina-adapter"] == "two" and float(raw.headers["x-afina-score"]) > 0.35
    got = raw.parse()
    assert got.model == "two" and "closest" in got.afina["why"]  # type: ignore[attr-defined]
    alone = client.chat.completions.create(
        model="two", messages=question, temperature=0, max_completion_tokens=12
    )  # type: ignore[arg-type]
    assert got.choices[0].message.content == alone.choices[0].message.content
    state.engine.registry.rename("two", "three")
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=question, max_completion_tokens=2
    )  # type: ignore[arg-type]
    assert raw.headers["x-afina-adapter"] == "three"
    state.engine.registry.rename("three", "two")
