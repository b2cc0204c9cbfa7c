"""Nothing of a row is lost: each field changes what is learned, is named as not used, or is refused.

Over all formats and fields: a row is read once as it is, once without the field and once with
another value. Where neither the examples nor the names of unused columns differ, and no error
names the field, it is lost.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from afina.data.renderer import Renderer
from afina.data.schemas import (
    EMBEDDING,
    LABELED,
    PREFERENCE,
    PROMPT,
    RELEVANCE,
    SFT,
    TAGGED,
    Schema,
)
from afina.data.table import read_table
from afina.errors import DataError, SettingsError
from afina.io.chat_format import ChatFormat
from afina.settings import TrainSettings
from afina.training.setup.no_effect import NO_EFFECT, check_effects
from helpers import write_rows

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "What is the weather in Lima?"}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Lima"}},
}
CALLS = {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "12 degrees", "tool_call_id": "c1", "name": "weather"}
ANSWER = {
    "role": "assistant",
    "content": "It is cool.",
    "reasoning_content": "12 is cool",
    "weight": 1,
}
WORSE = {"role": "assistant", "content": "No idea at all."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CHAT = [SYSTEM, USER, CALLS, RESULT, ANSWER]
SHAREGPT = [
    {"from": "human", "value": "What is the weather?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
    {"from": "observation", "value": "12 degrees"},
    {"from": "gpt", "value": "It is cool."},
]
ASKED = {"instruction": "Translate this.", "input": "The sea is blue.", "system": "Be kind."}
ALPACA = ASKED | {"history": [["Who are you?", "A small bot."]]}

FORMATS: dict[str, tuple[Schema[Any], dict[str, Any]]] = {
    "openai-chat": (SFT, {"messages": CHAT, "tools": [TOOL]}),
    "sharegpt": (SFT, {"conversations": SHAREGPT, "system": "Be kind.", "tools": [TOOL]}),
    "alpaca": (SFT, ALPACA | {"output": "El mar es azul."}),
    "prompt-completion": (
        SFT,
        {"prompt": "Who is it?", "completion": "It is me.", "system": "Be kind."},
    ),
    "input-output": (SFT, {"input": "Who is it?", "output": "It is me."}),
    "prompt-label": (SFT, {"prompt": "Is it late?", "label": "yes it is"}),
    "text": (SFT, {"text": "The sea is blue today."}),
    "pairs": (
        PREFERENCE,
        {"prompt": "Who is it?", "chosen": "It is me.", "rejected": "What do I know."},
    ),
    "alpaca pairs": (PREFERENCE, ALPACA | {"chosen": "El mar es azul.", "rejected": "No lo hago."}),
    "full chats": (
        PREFERENCE,
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE], "tools": [TOOL]},
    ),
    "openai pairs": (
        PREFERENCE,
        {
            "input": {"messages": [SYSTEM, USER], "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [WORSE],
        },
    ),
    "labels": (PREFERENCE, {"prompt": "Who is it?", "completion": "It is me.", "label": True}),
    "chats with labels": (PREFERENCE, {"messages": [USER, ANSWER], "label": False}),
    "kto": (PREFERENCE, ASKED | {"output": "El mar es azul.", "kto_tag": True}),
    "prompts": (PROMPT, {"prompt": "Who is it?", "reference": "It is me.", "tools": [TOOL]}),
    "prompts of chats": (PROMPT, {"messages": [SYSTEM, USER, ANSWER], "tools": [TOOL]}),
    "classes": (LABELED, {"text": "The sea is blue.", "text_pair": "It is green.", "label": "no"}),
    "text pairs": (EMBEDDING, {"query": "Where is it?", "passage": "It is in Lima."}),
    "triplets": (
        EMBEDDING,
        {"anchor": "Where is it?", "positive": "It is in Lima.", "negative": "Not at all."},
    ),
    "scored pairs": (EMBEDDING, {"sentence1": "A man.", "sentence2": "A woman.", "score": 0.5}),
    "query-passages": (
        RELEVANCE,
        {"query": "Where is it?", "passage": "It is in Lima.", "label": 1},
    ),
    "tagged-words": (TAGGED, {"tokens": ["Ann", "is", "here"], "ner_tags": ["B-P", "O", "O"]}),
    "pictures": (LABELED, {"image": {"bytes": b"x"}, "label": "sea"}),
}
# columns beside those of a format, with and without a meaning
BESIDE: dict[str, Any] = {
    "id": 7,
    "source": "web",
    "url": "https://example.org/a",
    "score": 0.5,
    "created_at": "2024-01-01",
    "topic": "weather and seas",
    "unheard_of": "some words of somebody",
    "text": "A second text of some words.",
    "text_pair": "Another text of some words.",
    "sentence": "A sentence beside the rest.",
    "context": "What one has to know first.",
    "system": "Answer in one word.",
    "system_prompt": "Answer in two words.",
    "tools": [TOOL],
    "functions": [TOOL],
    "tool_calls": [CALL],
    "reasoning_content": "I thought about it for long.",
    "thinking": "Let me think about it.",
    "explicación": "Porque el mar es así.",
    "weight": 0.5,
    "sample_weight": 2.0,
    "loss_mask": [1, 0, 1],
    "images": ["a.png"],
    "audio": "a sound of the sea",
    "input_ids": [1, 2, 3],
    "label": "a label of words",
    "labels": ["a", "b"],
    "chosen": "The better one of two.",
    "rejected": "The worse one of two.",
    "completion": "A completion beside the rest.",
    "output": "An output beside the rest.",
    "response": "A response beside the rest.",
    "messages": [USER, WORSE],
    "history": [["What now?", "Nothing at all."]],
}


def other_value(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return 0 if value == 1 else value + 1
    if isinstance(value, bytes):
        return value + b"y"
    if isinstance(value, str):
        names = {"user": "system", "human": "system", "gpt": "human"}
        return names.get(value, f"Now {value} indeed")
    if isinstance(value, dict):
        return {name: other_value(inner) for name, inner in value.items()}
    return [other_value(inner) for inner in value]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All fields of a row: its columns, the keys of its turns, and those of objects."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, dict) and len(path) < 3 and not {"function", "bytes"} & value.keys():
        for name, inner in value.items():
            found += [(*path, name), *paths_of(inner, (*path, name))]
    if isinstance(value, list) and len(path) < 3:
        for number, inner in enumerate(value):
            found += paths_of(inner, (*path, number))
    return found


def changed(row: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    row = copy.deepcopy(row)
    inner: Any = row
    for name in path[:-1]:
        inner = inner[name]
    change(inner, path[-1])
    return row


def delete(inner: Any, name: Any) -> None:
    del inner[name]


def replace(inner: Any, name: Any) -> None:
    inner[name] = other_value(inner[name])


@pytest.fixture(scope="module")
def render(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    renderer = Renderer(tokenizer, ChatFormat("chatml"), 4096)

    def examples(row: Any) -> Any:
        if hasattr(row, "chosen"):
            answers = [row.chosen, row.rejected]
            return [answer and tokens(row.row(answer)) for answer in answers]
        if hasattr(row, "item"):
            prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
            return str(prompt), row.tools, row.reference
        if hasattr(row, "words"):
            return row.words, row.tags
        if hasattr(row, "anchor"):
            return row.anchor, row.positives, row.negatives, row.score
        if hasattr(row, "content"):
            return row.content, row.pair, row.label
        return tokens(row)

    def tokens(row: Any) -> Any:
        if row.text is not None:
            return [(one.token_ids, one.loss_mask) for one in renderer.chunk_text(row, 4096)]
        return [(one.token_ids, one.loss_mask) for one in renderer.examples(row)]

    return examples


def read(path: Path, schema: Schema[Any], row: dict[str, Any], render: Any) -> tuple[Any, Any]:
    """What is learned of a row, and the columns that are not; an error counts as itself."""
    if "image" in row:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        write_rows(path, row)
    try:
        table = read_table(path, schema)
        return render(table.rows[0]), set(table.unused_columns)
    except DataError as error:
        return f"{error.what} {error.where}", set()


@pytest.mark.parametrize("format", FORMATS)
def test_every_field_of_a_format_is_learned_named_or_refused(
    format: str, render: Any, tmp_path: Path
) -> None:
    schema, row = FORMATS[format]
    if schema.keeps_record:
        return  # a reward function can read any field of the record
    examples, unused = read(tmp_path / "a.jsonl", schema, row, render)
    assert not isinstance(examples, str), examples
    lost = []
    for path in paths_of(row):
        name = ".".join(part for part in path if isinstance(part, str))
        for change in (delete, replace):
            found = read(tmp_path / "b.jsonl", schema, changed(row, path, change), render)
            if found == (examples, unused) and not any(name.startswith(u) for u in unused):
                lost.append((change.__name__, path))
    # a template joins a call and its result by their order; a weight of 1 is that of all answers
    assert {path[-1] for _, path in lost} <= {"tool_call_id", "name", "weight"}


@pytest.mark.parametrize("format", FORMATS)
def test_every_column_beside_a_format_is_learned_named_or_refused(
    format: str, render: Any, tmp_path: Path
) -> None:
    schema, row = FORMATS[format]
    if "image" in row:
        return  # Parquet has the same columns
    without = read(tmp_path / "a.jsonl", schema, row, render)
    for name, value in BESIDE.items():
        if name in row:
            continue
        examples, unused = read(tmp_path / "b.jsonl", schema, row | {name: value}, render)
        refused = isinstance(examples, str) and name in examples
        assert refused or name in unused or (examples, unused) != without, name
        neutral = ("id", "source", "url", "score", "created_at")
        if name in neutral and name not in schema.fields:
            assert examples == without[0] and name in unused, name


IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"invocation": "now"}, "invocation"),
    ({"method": "full", "alpha": 3.0}, "alpha"),
    ({"method": "freeze", "scaling": "rslora"}, "scaling"),
    ({"method": "full", "rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"parameter_budget": 100}, "parameter_budget"),
    ({"eval_size": 0.2, "eval_data": "b.jsonl"}, "eval_size"),
    ({"objective": "classify", "chat_template": "plain"}, "chat_template"),
    ({"objective": "embed", "chat_template": "plain"}, "chat_template"),
    ({"objective": "classify", "new_tokens": ["<a>"]}, "new_tokens"),
    ({"objective": "classify", "template_kwargs": {"a": 1}}, "template_kwargs"),
    ({"objective": "classify", "allow_control_tokens": True}, "allow_control_tokens"),
    ({"objective": "pretrain", "truncate": True}, "truncate"),
    ({"revision": "main"}, "revision"),
]


@pytest.mark.parametrize(("values", "name"), IGNORED, ids=[name for _, name in IGNORED])
def test_a_setting_that_nothing_reads_is_refused(values: dict[str, Any], name: str) -> None:
    settings = TrainSettings(data=Path("a.jsonl"), **values)
    with pytest.raises(SettingsError, match=f"{name} .* has no effect here") as caught:
        check_effects(settings)
    assert caught.value.where == name
    used = {
        "invocation": {"method": "alora"},
        "parameter_budget": {"target_modules": "auto"},
        "eval_size": {"eval_data": None},
        "revision": {"base": "someone/a-model"},
    }
    other = used.get(name, {"method": "lora", "objective": "sft"})
    check_effects(TrainSettings(data=Path("a.jsonl"), **values | other))


def test_every_such_setting_is_tested() -> None:
    assert {name for _, name in IGNORED} == set(NO_EFFECT)
    assert set(NO_EFFECT) <= set(TrainSettings.model_fields)
