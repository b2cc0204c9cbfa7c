"""JSON schemas: an answer that ends parses and validates; a limit of tokens is told as one."""

import json
import sys
from typing import Any

import jsonschema
import pytest
import torch

from afina.adapters.active import BASE_ONLY
from afina.data.renderer import Renderer
from afina.engine.engine import generate_completions
from afina.engine.grammar import GrammarCompiler
from afina.engine.request import SamplingParams
from afina.engine.sampler import Sampler, sample
from afina.errors import DataError, SettingsError
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from helpers import tiny_tokenizer

NAME = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "name": NAME,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age", "ok"],
        "additionalProperties": False,
    },
    "choice": {"enum": ["sí", "no", "quizá €", 7, None]},
    "list": {
        "type": "array",
        "items": {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25},
        "minItems": 2,
        "maxItems": 3,
    },
    "either": {
        "anyOf": [
            {"type": "null"},
            {
                "type": "object",
                "properties": {"x": {"const": 1}},
                "required": ["x"],
                "additionalProperties": False,
            },
        ]
    },
    "nested": {
        "$defs": {"word": {"type": "string", "pattern": "^[a-zñ]{1,6}$"}},
        "type": "object",
        "properties": {
            "words": {
                "type": "array",
                "items": {"$ref": "#/$defs/word"},
                "minItems": 1,
                "maxItems": 3,
            }
        },
        "required": ["words"],
        "additionalProperties": False,
    },
    "date": {"type": "string", "format": "date"},
}


@pytest.fixture(scope="module")
def embedded() -> CausalLM:
    return load_base(dtype="float32")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_that_ends_satisfies_its_schema(
    embedded: CausalLM, name: str, temperature: float
) -> None:
    schema = SCHEMAS[name]
    renderer = Renderer(embedded.tokenizer, None, embedded.max_positions)
    prompts = [renderer.prompt(text) for text in ("Tell me about Ana as JSON.", "¡Hola!", "7")]
    sampling = SamplingParams(96, temperature=temperature, json_schema=schema, seed=3)
    answers = generate_completions(embedded, prompts, sampling, BASE_ONLY, renderer.stop_token_ids)
    for said in answers:
        assert len(said.token_ids) < 96, said.text
        jsonschema.validate(
            json.loads(said.text), schema, format_checker=jsonschema.FormatChecker()
        )
    if temperature and name == "object":
        assert len({said.text for said in answers}) > 1


def test_a_limit_that_is_too_low_is_told_and_what_came_is_a_beginning(embedded: CausalLM) -> None:
    renderer = Renderer(embedded.tokenizer, None, embedded.max_positions)
    schema = {
        "type": "object",
        "properties": {"long": {"type": "string", "minLength": 60}},
        "required": ["long"],
    }
    said = generate_completions(
        embedded, [renderer.prompt("Hello!")], SamplingParams(12, json_schema=schema)
    )[0]
    assert len(said.token_ids) == 12 and not said.ended_by_stop
    assert said.text.startswith('{"long": "')
    with pytest.raises(json.JSONDecodeError):
        json.loads(said.text)


def test_an_empty_schema_is_any_object(embedded: CausalLM) -> None:
    renderer = Renderer(embedded.tokenizer, None, embedded.max_positions)
    stop = embedded.tokenizer('"}')["input_ids"][-1]  # so that it comes to an end
    said = generate_completions(
        embedded,
        [renderer.prompt("Hello!")],
        SamplingParams(60, json_schema={}, logit_bias={stop: 90.0}),
    )[0]
    assert isinstance(json.loads(said.text), dict) and len(said.token_ids) < 60


def test_the_grammar_wins_over_bias_and_ends_with_a_stop_token() -> None:
    tokenizer = tiny_tokenizer()
    stop, width = (
        tokenizer.eos_token_id,
        len(tokenizer) + 7,
    )  # rows that the model has beyond its tokenizer
    grammars = GrammarCompiler(tokenizer)

    def say(schema: dict[str, Any], logits: torch.Tensor, **settings: Any) -> tuple[str, list[int]]:
        one = Sampler(SamplingParams(**settings), [], width, grammars.of(schema, {stop}))
        said: list[int] = []
        while not one.is_finished:
            said.append(sample(logits[None], [one])[0].token)
            assert len(said) < 50
        return tokenizer.decode(said, skip_special_tokens=True), said

    flat = torch.zeros(width)
    digit, other = tokenizer("1")["input_ids"][0], tokenizer("b")["input_ids"][0]
    # "ab" cannot go on: it is finished at once; 1 could: it ends by the stop token, not allowed before
    text, said = say({"enum": ["a", "ab"]}, flat, logit_bias={other: 100.0, stop: 50.0})
    assert json.loads(text) == "ab" and said[-1] != stop
    text, said = say(
        {"type": "integer"}, flat, logit_bias={width - 1: 100.0, stop: 90.0, digit: 5.0}
    )
    assert text == "1" and said == [digit, stop]


def test_mixed_with_others_in_one_batch() -> None:
    tokenizer = tiny_tokenizer()
    width = len(tokenizer)
    logits = torch.randn(3, width)
    strict = Sampler(
        SamplingParams(), [], width, GrammarCompiler(tokenizer).of({"type": "object"}, {2})
    )
    told = sample(
        logits, [Sampler(SamplingParams(), [], width), strict, Sampler(SamplingParams(), [], width)]
    )
    assert [told[0].token, told[2].token] == logits[[0, 2]].argmax(-1).tolist()
    assert tokenizer.decode([told[1].token]).startswith("{")


def test_each_grammar_stands_where_its_own_answer_is() -> None:
    tokenizer = tiny_tokenizer()
    grammars = GrammarCompiler(tokenizer)
    first, second = (grammars.of({"const": "x"}, {2}) for _ in range(2))
    start = second.allowed_tokens(len(tokenizer))
    first.accept_token(tokenizer('"')["input_ids"][0])
    assert torch.equal(second.allowed_tokens(len(tokenizer)), start)
    assert not torch.equal(first.allowed_tokens(len(tokenizer)), start)
    with pytest.raises(DataError, match="cannot be followed any further"):
        first.accept_token(tokenizer("y")["input_ids"][0])


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": 3}, "properties|3"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_followed_is_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError, match="schema") as error:
        GrammarCompiler(tiny_tokenizer()).of(schema, {2})
    assert error.value.why is not None and "\n" not in error.value.why
    assert any(word in error.value.why for word in why.split("|"))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SettingsError, match=r"afina\[serve\]"):
        GrammarCompiler(tiny_tokenizer())
