"""Data: every format and every fault of one; the exact span that is learned; packing, shifting and splitting."""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from afina.data.packing import (
    BatchSampler,
    PackedBatch,
    group_by_length,
    pack_examples,
    train_eval_split,
)
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT, SFTRow, text_of
from afina.data.table import Table, read_table
from afina.errors import AfinaError, DataError

USER, ANSWER = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}


def read_sft(
    path: Path, columns: dict[str, str] | None = None, skip_bad_rows: bool = False
) -> Table[SFTRow]:
    return read_table(path, SFT, columns, skip_bad_rows)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path):
    def _write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


def contents(row: SFTRow) -> object:
    """What a row holds, wherever it came from."""
    if row.messages is not None:
        return [(message["role"], text_of(message)) for message in row.messages]
    return row.text if row.text is not None else (row.prompt, row.completion)


# formats

CHAT = [("user", "who?"), ("assistant", "me")]
GOOD = {
    "chat": (jsonl({"messages": [USER, ANSWER]}), "openai-chat", CHAT),
    "chat-array": (json.dumps([{"messages": [USER, ANSWER]}], indent=2), "openai-chat", CHAT),
    "chat-object": (json.dumps({"messages": [USER, ANSWER]}, indent=2), "openai-chat", CHAT),
    "chat-developer-and-parts": (
        jsonl(
            {
                "messages": [
                    {"role": "developer", "content": "be kind"},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "who"}, {"type": "text", "text": "?"}],
                    },
                    ANSWER,
                ]
            }
        ),
        "openai-chat",
        [("developer", "be kind"), *CHAT],
    ),
    "chat-tool-calls": (
        jsonl(
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "1",
                                "type": "function",
                                "function": {"name": "f", "arguments": '{"x": 1}'},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "2"},
                    ANSWER,
                ]
            }
        ),
        "openai-chat",
        [CHAT[0], ("assistant", '[{"name": "f", "arguments": {"x": 1}}]'), ("tool", "2"), CHAT[1]],
    ),
    "chat-empty-system": (
        jsonl({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}),
        "openai-chat",
        CHAT,
    ),
    "sharegpt": (
        jsonl(
            {
                "system": "be kind",
                "tools": "[]",
                "conversations": [
                    {"from": "human", "value": "who?"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "me"},
                ],
            }
        ),
        "sharegpt",
        [
            ("system", "be kind"),
            CHAT[0],
            ("assistant", '[{"name": "f", "arguments": {}}]'),
            ("tool", "2"),
            CHAT[1],
        ],
    ),
    "alpaca": (jsonl({"instruction": "who?", "input": "", "output": "me"}), "alpaca", CHAT),
    "alpaca-all": (
        jsonl(
            {
                "instruction": "add",
                "input": "1 2",
                "output": "3",
                "system": "s",
                "history": [["who?", "me"]],
            }
        ),
        "alpaca",
        [("system", "s"), *CHAT, ("user", "add\n1 2"), ("assistant", "3")],
    ),
    "prompt-completion": (
        jsonl({"id": 1, "prompt": "who?", "completion": " me"}),
        "prompt-completion",
        ("who?", " me"),
    ),
    "prompt-label": (jsonl({"prompt": "good", "label": 1}), "prompt-completion", ("good", "1")),
    "line-separator-in-a-string": (
        '{"prompt": "a\u2028b", "completion": "c"}',
        "prompt-completion",
        ("a\u2028b", "c"),
    ),
    "byte-order-mark": ("\ufeff" + jsonl({"text": "hello"}), "text", "hello"),
    "windows-1252": ("una caña en el río\n".encode("cp1252"), "text", "una caña en el río"),
    "utf-16": ("una caña\n".encode("utf-16"), "text", "una caña"),
    "rows-below-a-key": (
        json.dumps({"version": 1, "data": [{"prompt": "a", "completion": "b"}]}),
        "prompt-completion",
        ("a", "b"),
    ),
    "rows-by-id": (
        json.dumps({"q17": {"prompt": "a", "completion": "b"}}, indent=1),
        "prompt-completion",
        ("a", "b"),
    ),
    "text-jsonl": (jsonl({"text": "hello"}), "text", "hello"),
    "csv": (
        'prompt,completion\r\n"a ""b"",\r\nc",d\r\n',
        "prompt-completion",
        ('a "b",\r\nc', "d"),
    ),
    "semicolons": ("prompt;completion;x\na;b;c\n", "prompt-completion", ("a", "b")),
    "tsv-with-bare-quotes": (
        'prompt\tcompletion\n"a b" c\td\n',
        "prompt-completion",
        ('"a b" c', "d"),
    ),
    "csv-of-messages": (
        "id,messages\n1," + '"' + json.dumps([USER, ANSWER]).replace('"', '""') + '"',
        "openai-chat",
        CHAT,
    ),
    "text": (
        "One line, and\n\nanother paragraph.\n",
        "text",
        "One line, and\n\nanother paragraph.",
    ),
    "text-with-a-bracket": ("[1] not JSON, prompt\n", "text", "[1] not JSON, prompt"),
}


@pytest.mark.parametrize("case", GOOD)
def test_formats_are_recognised_by_content(write, case: str) -> None:
    content, format, expected = GOOD[case]
    path = write("data", content)
    table = read_sft(path)
    assert (table.format, [contents(row) for row in table.rows]) == (format, [expected])
    assert table.skipped == []
    assert len(table.digest) == 64


def test_columns_give_names_and_win_over_names_that_are_there(write) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    for content in (
        jsonl({"question": "a", "answer": "b", "prompt": "c"}),
        "question,answer,prompt\na,b,c\n",
    ):
        table = read_sft(write("data", content), columns)
        assert [contents(row) for row in table.rows] == [("a", "b")]
    table = read_sft(
        write("data", jsonl({"text": "a", "code": "b"})), {"prompt": "text", "completion": "code"}
    )
    assert contents(table.rows[0]) == ("a", "b")


def test_places_of_rows(write) -> None:
    row = {"prompt": "a", "completion": "b"}
    for name, content, places in (
        ("x.jsonl", "\n" + jsonl(row) + "\n" + jsonl(row), ["x.jsonl:2", "x.jsonl:4"]),
        ("x.json", json.dumps([row, row]), ["x.json:row 1", "x.json:row 2"]),
        ("x.csv", 'prompt,completion\n"a\nb",c\nd,e\n', ["x.csv:2", "x.csv:4"]),
        ("x.txt", "\n\none\n\n\n\ntwo\n\nstill two\n\f\nthree", ["x.txt:3", "x.txt:7", "x.txt:11"]),
    ):
        path = write(name, content)
        assert [row.where for row in read_sft(path).rows] == [
            str(path.parent / place) for place in places
        ]
    texts = read_sft(write("x.txt", "one\n\n\ntwo\n\nstill two\n\f\nthree")).rows
    assert [row.text for row in texts] == ["one", "two\n\nstill two", "three"]


def test_parquet(write, tmp_path: Path, monkeypatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "named.jsonl"  # the content decides
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER]}]
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    table = read_sft(path, skip_bad_rows=True)
    assert (table.format, [contents(row) for row in table.rows]) == ("openai-chat", [CHAT])
    assert table.skipped == [f"{path}:row 2:messages: no assistant message"]
    with pytest.raises(DataError, match="damaged"):
        read_sft(write("cut", path.read_bytes()[:60]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "afina\[parquet\]"'):
        read_sft(path)


BAD = {
    "empty": ("x.jsonl", b"", "x.jsonl: the file is empty"),
    "blank": ("x.jsonl", b" \n\n", "x.jsonl: the file is empty"),
    "no-rows": ("x.json", b"[]", "x.json: the file has no rows"),
    "header-only": ("x.csv", b"prompt,completion\n", "x.csv: the file has no rows"),
    "broken-first": ("x.jsonl", b"{'prompt': 'a'}\n", "x.jsonl:1: broken JSON"),
    "broken-second": ("x", jsonl({"text": "a"}) + '{"text": "b"', "x:2: broken JSON"),
    "broken-array": ("x.json", b'[{"text": "a"},\n {"text" "b"}]', "x.json:2: broken JSON"),
    "not-json": ("x.jsonl", b"hello\n", "x.jsonl:1: broken JSON"),
    "not-an-object": (
        "x.jsonl",
        jsonl({"text": "a"}, ["b"]),
        "x.jsonl:2: expected an object {...}, found a list",
    ),
    "damaged-utf8": ("x.txt", "año\nca".encode() + b"\xf1a\n", "x.txt:2: not UTF-8 text"),
    "cyrillic": ("x.txt", "one\nдом у моря".encode("cp1251"), "x.txt:2: not UTF-8 text"),
    "gzip": ("x.txt", b"\x1f\x8b\x08\0\0", "x.txt: the file is compressed"),
    "binary": ("x.txt", b"\x01\0\x02", "x.txt: a binary file cannot be read"),
    "not-parquet": ("x.parquet", b"hello", "x.parquet: not a Parquet file"),
    "missing": (
        "x.jsonl",
        jsonl({"prompt": "a", "completion": "b"}, {"prompt": "a"}),
        "x.jsonl:2:completion: the field is missing",
    ),
    "missing-in-all": (
        "x.jsonl",
        jsonl({"prompt": "a"}),
        "x.jsonl:1:completion: the field is missing",
    ),
    "empty-field": (
        "x.json",
        json.dumps([{"instruction": "a", "output": " "}]),
        "x.json:row 1:output: the field is empty",
    ),
    "wrong-type": (
        "x.jsonl",
        jsonl({"prompt": "a", "completion": 3}),
        "x.jsonl:1:completion: expected text, found a number",
    ),
    "null": ("x.jsonl", jsonl({"text": None}), "x.jsonl:1:text: the field is missing"),
    "half-a-surrogate": ("x.jsonl", b'{"text": "\\ud83d"}', "x.jsonl:1:text: not valid Unicode"),
    "bad-input": (
        "x.jsonl",
        jsonl({"instruction": "a", "input": 1, "output": "b"}),
        "x.jsonl:1:input: expected text, found a number",
    ),
    "bad-history": (
        "x.jsonl",
        jsonl({"instruction": "a", "output": "b", "history": [["c"]]}),
        "x.jsonl:1:history[0]: expected a pair",
    ),
    "no-turns": (
        "x.jsonl",
        jsonl({"messages": "hi"}),
        "x.jsonl:1:messages: expected a list of messages as JSON",
    ),
    "no-answer": (
        "x.jsonl",
        jsonl({"messages": [USER]}),
        "x.jsonl:1:messages: no assistant message",
    ),
    "turn-type": (
        "x.jsonl",
        jsonl({"messages": [USER, "me"]}),
        "x.jsonl:1:messages[1]: expected an object",
    ),
    "role": (
        "x.jsonl",
        jsonl({"messages": [{"role": "asistant", "content": "a"}]}),
        "x.jsonl:1:messages[0].role: unknown role 'asistant'",
    ),
    "no-content": (
        "x.jsonl",
        jsonl({"messages": [USER, {"role": "assistant", "content": None}]}),
        "x.jsonl:1:messages[1].content: the field is missing",
    ),
    "empty-content": (
        "x.jsonl",
        jsonl({"messages": [USER, {"role": "assistant", "content": ""}]}),
        "x.jsonl:1:messages[1].content: the field is empty",
    ),
    "image": (
        "x.jsonl",
        jsonl({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}),
        "x.jsonl:1:messages[0].content[0]: only parts of type text",
    ),
    "weight": (
        "x.jsonl",
        jsonl({"messages": [USER, ANSWER | {"weight": 2}]}),
        "x.jsonl:1:messages[1].weight: a weight",
    ),
    "sharegpt-value": (
        "x.jsonl",
        jsonl({"conversations": [{"from": "human", "value": 1}]}),
        "x.jsonl:1:conversations[0].value: expected text, found a number",
    ),
    "csv-too-many": ("x.csv", b"prompt,completion\na,b,c\n", "x.csv:2: 3 fields, the header has 2"),
    "csv-too-few": ("x.csv", b"prompt,completion\na\n", "x.csv:2:completion: the field is missing"),
    "csv-quotes": ("x.csv", b'prompt,completion\na,b\n"a"b,c\n', "x.csv:3: broken CSV"),
    "csv-twice": (
        "x.csv",
        b"prompt,completion,prompt\na,b,c\n",
        "x.csv:1: two columns have the same name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_faults_name_file_line_and_field(write, case: str) -> None:
    name, content, expected = BAD[case]
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read_sft(path)
    assert str(caught.value).startswith(f"{path.parent}/{expected}")


def test_faults_of_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is a folder"):
        read_sft(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_sft(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "columns", "found", "hint"),
    [
        (
            "x.jsonl",
            jsonl({"question": "a", "answer": "b"}),
            {},
            "question, answer",
            "{prompt: question, completion: answer}",
        ),
        (
            "x.csv",
            "question,answer\na,b\n",
            {},
            "question, answer",
            "--columns '{prompt: question, completion: answer}'",
        ),
        (
            "x.tsv",
            "sentence\tlabel\na\t1\n",
            {},
            "sentence, label",
            "--objective classify --columns '{text: sentence}'",
        ),
        # what was told is kept where it leads somewhere, and a column is not given twice
        ("x.csv", "Q,A\na,b\n", {"prompt": "Q"}, "Q, A", "--columns '{prompt: Q, completion: A}'"),
        (
            "x.csv",
            "Q,A\na,b\n",
            {"prompt": "Q", "output": "A"},
            "Q, A",
            "--columns '{prompt: Q, completion: A}'",
        ),
        (
            "x.json",
            json.dumps([{"instruction": "a", "response": "b"}]),
            {},
            "instruction, response",
            "{output: response}",
        ),
        (
            "x.jsonl",
            jsonl({"question": "a", "answer": "b"}),
            {"prompt": "qestion"},
            "question, answer",
            "'question'?",
        ),
        ("x.txt", "just text", {"prompt": "question"}, "text", "text"),
        ("x.jsonl", jsonl({"question": "a"}), {"promt": "question"}, "promt", "'prompt'?"),
    ],
)
def test_unknown_columns_say_what_to_type(write, name, content, columns, found, hint) -> None:
    with pytest.raises(DataError) as caught:
        read_sft(write(name, content), columns)
    assert found in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_renamed_field_is_called_by_the_users_name(write) -> None:
    path = write("x.jsonl", jsonl({"q": "a", "a": "b"}, {"q": "a", "a": ""}))
    with pytest.raises(DataError) as caught:
        read_sft(path, {"prompt": "q", "completion": "a"})
    assert caught.value.where == f"{path}:2:a"


def test_bad_rows_are_left_out_only_when_asked_and_are_listed(write) -> None:
    path = write("x.jsonl", jsonl({"text": "a"}, {"text": 1}) + "{broken\n" + jsonl({"text": "b"}))
    table = read_sft(path, skip_bad_rows=True)
    assert [row.text for row in table.rows] == ["a", "b"]
    assert table.skipped[0] == f"{path}:2:text: expected text, found a number"
    assert len(table.skipped) == 2
    assert table.skipped[1].startswith(f"{path}:3: broken JSON")
    with pytest.raises(DataError, match="no row can be used"):
        read_sft(write("y.jsonl", jsonl({"text": 1})), skip_bad_rows=True)


def test_long_csv_field_and_callers_limit(write) -> None:
    limit = csv.field_size_limit()
    table = read_sft(write("x.csv", f"prompt,completion\n{'a' * 200_000},b\n"))
    assert len(table.rows[0].prompt or "") == 200_000
    assert csv.field_size_limit() == limit


# templates

GOOD_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSES_AGAIN = GOOD_TEMPLATE.replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<x>' }}"
)
NO_STOP = GOOD_TEMPLATE.replace("<|im_end|>", "")
LETTERS_FOR_A_STOP = GOOD_TEMPLATE.replace("<|im_end|>", "<|the_end|>")
NO_PREFIX = GOOD_TEMPLATE.replace("{{ bos_token }}", "{{ messages | length }}")
CHANGES_EARLIER_ANSWERS = GOOD_TEMPLATE.replace(
    "m['content'] | trim",
    "('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content']",
)
STOPS_TWICE = (
    GOOD_TEMPLATE.replace("{% endif %}", "{% endif %}", 1)
    + "{% if not add_generation_prompt %}</s>{% endif %}"
)
NO_PROMPT = "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endfor %}"
SPACE_BEFORE_ANSWER = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXTS = [
    "who are you? me and them, hello there",
    "the answer is me: hello and good bye",
    "assistant: hello user: who",
]


def make_tokenizer(chat_template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens; with `bos` it begins every text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 0)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[2:],
    )
    wrapped.chat_template = chat_template
    return wrapped


def learned(renderer: Renderer, example: Example) -> list[str]:
    """The texts of the labelled runs."""
    return [part.partition("»")[0] for part in renderer.format_loss_mask(example).split("«")[1:]]


def chat_row(*contents: str) -> SFTRow:
    roles = ["user", "assistant"] * len(contents)
    return SFTRow(
        "x.jsonl:1",
        messages=tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False)),
    )


PAIR = SFTRow("x.jsonl:1", prompt="who are you?", completion=" me")


def test_single_turn_mask_is_the_answer_and_its_stop_token() -> None:
    tokenizer = make_tokenizer(GOOD_TEMPLATE, bos=True)
    renderer = Renderer(tokenizer, None, 512)
    example = renderer.example(chat_row("who?", "me and them"))
    whole = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": "me and them"}])[
        "input_ids"
    ]
    assert example.token_ids == whole
    assert example.token_ids.count(0) == 1
    assert learned(renderer, example) == ["me and them<|im_end|>"]
    assert tokenizer.decode(example.token_ids[-1:]) == "\n"
    assert example.loss_mask[-1] is False
    assert example.completion == "me and them"
    assert (
        example.token_ids[: example.prompt_length]
        == renderer.prompt([USER])
        == renderer.prompt("who?")
    )
    assert renderer.stop_token_ids == {1, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_multi_turn_mask_and_last_prompt() -> None:
    renderer = Renderer(make_tokenizer(GOOD_TEMPLATE), None, 512)
    row = chat_row("who?", "me", "and?", "them", "left over")
    example = renderer.example(row)
    assert learned(renderer, example) == ["me<|im_end|>", "them<|im_end|>"]
    assert example.completion == "them"
    assert row.messages
    assert example.token_ids[: example.prompt_length] == renderer.prompt(row.messages[:3])
    assert "left over" not in renderer.format_loss_mask(example)


def test_opening_answers_and_weight_0_are_context() -> None:
    renderer = Renderer(make_tokenizer(GOOD_TEMPLATE), None, 512)
    greeting = {"role": "assistant", "content": "hello"}
    example = renderer.example(
        SFTRow("x", messages=(greeting, USER, ANSWER | {"weight": "0"}, USER, ANSWER))
    )
    assert learned(renderer, example) == ["me<|im_end|>"]
    for messages in ((greeting, USER), (USER, ANSWER | {"weight": "0"})):
        with pytest.raises(DataError, match="all off"):
            renderer.example(SFTRow("x", messages=messages))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [None, "plain"])
def test_prompt_and_completion_without_a_template(template: str | None, bos: bool) -> None:
    tokenizer = make_tokenizer(GOOD_TEMPLATE if template else None, bos)
    renderer = Renderer(tokenizer, template, 512)
    example = renderer.example(PAIR)
    assert tokenizer.decode(example.token_ids) == "<s>" * bos + "who are you? me</s>"
    assert learned(renderer, example) == [" me</s>"]
    assert example.token_ids[: example.prompt_length] == renderer.prompt("who are you?")
    assert renderer.example(SFTRow("x", prompt="a", completion="b</s>")).token_ids.count(1) == 1
    assert renderer.example(SFTRow("x", prompt="<s>a", completion="b")).token_ids.count(0) == 1


def test_prompt_and_completion_are_a_chat_where_there_is_a_template() -> None:
    renderer = Renderer(make_tokenizer(GOOD_TEMPLATE), None, 512)
    example = renderer.example(SFTRow("x", prompt="who?", completion="me"))
    assert example == renderer.example(SFTRow("x", messages=(USER, ANSWER)))
    assert renderer.prompt("who?", raw=True) == renderer.tokenizer("who?")["input_ids"]


def test_plain_joins_turns() -> None:
    renderer = Renderer(make_tokenizer(bos=True), "plain", 512)
    example = renderer.example(chat_row("who?", "me", "and?", "them"))
    assert renderer.format_loss_mask(example) == "<s>who?\n«me</s>»\nand?\n«them</s>»"


def test_chatml_on_a_base_with_and_without_its_tokens(monkeypatch) -> None:
    renderer = Renderer(make_tokenizer(), "chatml", 512)
    assert renderer.format_loss_mask(renderer.example(PAIR)) == (
        "<|im_start|>user\nwho are you?<|im_end|>\n<|im_start|>assistant\n« me<|im_end|>»\n"
    )
    bare = make_tokenizer(bos=True)
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(
            bare.backend_tokenizer.to_str().replace("<|im_", "<|xx_")
        ),
        bos_token="<s>",
        eos_token="</s>",
    )
    renderer = Renderer(bare, "chatml", 512)
    assert renderer.format_loss_mask(renderer.example(PAIR)) == (
        "<s><|im_start|>user\nwho are you?</s>\n<|im_start|>assistant\n« me</s>»\n"
    )


def test_template_from_a_file(write) -> None:
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer, str(write("t.jinja", SPACE_BEFORE_ANSWER)), 512)
    assert learned(renderer, renderer.example(PAIR)) == [" me</s>"]
    with pytest.raises(DataError, match="cannot read the template"):
        Renderer(tokenizer, "chatlm", 512)


def test_a_token_over_the_boundary_is_cut_where_generation_starts() -> None:
    tokenizer = make_tokenizer(SPACE_BEFORE_ANSWER)
    renderer = Renderer(tokenizer, None, 512)
    row = chat_row("who", "hello", "who", "hello there")
    whole = tokenizer.apply_chat_template(list(row.messages or ()))["input_ids"]
    prompt = renderer.prompt([{"role": "user", "content": "who"}])
    assert whole[: len(prompt)] != prompt  # else this test shows nothing
    first, last = renderer.examples(row)  # the prompt of the second answer has such a token
    assert first.token_ids[: len(prompt)] == prompt
    assert learned(renderer, first) == ["hello</s>"]
    assert learned(renderer, last) == ["hello there</s>"]
    assert last.token_ids[: last.prompt_length] == renderer.prompt(row.messages[:3])
    assert tokenizer.decode(last.token_ids) == tokenizer.decode(whole)


@pytest.mark.parametrize(
    ("template", "num_examples"), [(NO_PREFIX, 2), (CHANGES_EARLIER_ANSWERS, 2), (GOOD_TEMPLATE, 1)]
)
def test_a_template_that_rewrites_history_gets_an_example_for_each_answer(
    template: str, num_examples: int
) -> None:
    renderer = Renderer(make_tokenizer(template), None, 512)
    row = chat_row("who?", "me", "and?", "them")
    examples = renderer.examples(row)
    assert len(examples) == num_examples
    assert row.messages
    for number, example in zip((1, 3)[-num_examples:], examples, strict=True):
        assert example.token_ids[: example.prompt_length] == renderer.prompt(row.messages[:number])
    answers = [text for example in examples for text in learned(renderer, example)]
    thought = "<think></think>" if template is CHANGES_EARLIER_ANSWERS else ""
    assert answers == [f"{thought}me<|im_end|>", f"{thought}them<|im_end|>"]


def test_stop_is_the_first_end_after_the_answer() -> None:
    renderer = Renderer(make_tokenizer(STOPS_TWICE), None, 512)
    example = renderer.example(chat_row("who?", "me", "and?", "them"))
    assert learned(renderer, example) == ["me<|im_end|>", "them<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "row", "what", "hint"),
    [
        (None, chat_row("who?", "me"), "no chat template", "--chat-template chatml"),
        (NO_STOP, chat_row("who?", "me"), "stop token is not trained", "eos_token"),
        (LETTERS_FOR_A_STOP, chat_row("who?", "me"), "stop token is not trained", "eos_token"),
        (CLOSES_AGAIN, chat_row("who?", "and?<x>"), "does not render as a prefix", "chatml"),
        (
            "{% for m in messages %}x{% endfor %}",
            chat_row("who?", "me"),
            "does not write the answer",
            "chatml",
        ),
        (NO_PROMPT, PAIR, "all on", "pretrain"),
        (
            GOOD_TEMPLATE,
            SFTRow("x", messages=({"role": "tool", "content": "2"}, ANSWER)),
            "rejects these",
            "roles",
        ),
    ],
)
def test_templates_that_would_train_something_else_are_refused(
    template, row: SFTRow, what: str, hint: str
) -> None:
    renderer = Renderer(make_tokenizer(template), None, 512)
    for refuse in (renderer.example, lambda row: renderer.check_template([row])):
        with pytest.raises(DataError, match=what) as caught:
            refuse(row)
        assert hint in (caught.value.hint or "")


def test_a_template_without_a_stop_token_can_still_be_asked() -> None:
    renderer = Renderer(make_tokenizer(NO_STOP), None, 512)
    assert renderer.stop_token_ids == {1}
    assert renderer.prompt("who?")


def test_check_leaves_single_bad_rows_to_the_reader() -> None:
    renderer = Renderer(make_tokenizer(GOOD_TEMPLATE), None, 512)
    bad = SFTRow("x", messages=({"role": "tool", "content": "2"}, ANSWER))
    renderer.check_template([bad, chat_row("who?", "me")])
    renderer.check_template([])
    Renderer(make_tokenizer(), None, 512).check_template([PAIR, SFTRow("x", text="a text")])


def test_length_and_text_rows_are_refused_with_their_place() -> None:
    renderer = Renderer(make_tokenizer(), None, 8)
    assert len(renderer.example(SFTRow("x", prompt="who", completion="me")).token_ids) <= 8
    with pytest.raises(
        DataError, match=r"x.jsonl:7: 4\d tokens, more than the 8 allowed"
    ) as caught:
        renderer.example(SFTRow("x.jsonl:7", prompt="z" * 40, completion="me"))
    assert "--max-length" in (caught.value.hint or "")
    assert "--skip-bad-rows" in (caught.value.hint or "")
    with pytest.raises(DataError) as caught:
        renderer.example(SFTRow("x", text="hello"))
    assert caught.value.hint == "--objective pretrain"


@pytest.mark.parametrize("length", [1, 2, 7, 8, 14, 15, 16, 17, 31])
def test_texts_hold_every_token_once(length: int) -> None:
    renderer = Renderer(make_tokenizer(bos=True), None, 512)
    text = "z" * length
    chunks = renderer.chunk_text(SFTRow("x", text=text), 8)
    assert [token for chunk in chunks for token in chunk.token_ids] == [
        0,
        *renderer.tokenizer(text)["input_ids"][1:],
        1,
    ]
    for chunk in chunks:
        assert 2 <= len(chunk.token_ids) <= 8
        assert chunk.completion is None
        assert chunk.loss_mask == [False] + [True] * (len(chunk.token_ids) - 1)
    assert all(
        len(chunk.token_ids) <= 4
        for chunk in Renderer(renderer.tokenizer, None, 4).chunk_text(SFTRow("x", text=text), 8)
    )


def test_texts_of_a_chat_are_its_rendering() -> None:
    renderer = Renderer(make_tokenizer(GOOD_TEMPLATE), None, 512)
    (chunk,) = renderer.chunk_text(chat_row("who?", "me"), 512)
    assert chunk.token_ids == renderer.example(chat_row("who?", "me")).token_ids
    assert all(chunk.loss_mask[1:])


# batches


def make_examples(lengths: list[int]) -> list[Example]:
    """Tokens 1000 * row + position, the second half labelled."""
    return [
        Example(
            str(n),
            [1000 * n + t for t in range(size)],
            [t >= max(1, size // 2) for t in range(size)],
            1,
            None,
        )
        for n, size in enumerate(lengths, 1)
    ]


def test_labels_are_shifted_and_never_cross_a_sequence() -> None:
    examples = make_examples([4, 2, 5])
    batch = pack_examples(examples)
    assert batch.cu_seqlens == (0, 4, 6, 11)
    assert batch.token_ids.tolist() == [
        token for example in examples for token in example.token_ids
    ]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]
    off = -100
    assert batch.labels.tolist() == [off, 1002, 1003, off, 2001, off, off, 3002, 3003, 3004, off]
    assert batch.num_targets == 6 == sum(sum(example.loss_mask) for example in examples)
    assert {part.dtype for part in (batch.token_ids, batch.positions, batch.labels)} == {
        torch.int64
    }
    moved = batch.to("cpu")
    assert isinstance(moved, PackedBatch)
    assert moved.num_targets == 6
    assert moved.cu_seqlens == batch.cu_seqlens


def test_labels_on_everything_still_stop_at_the_boundary() -> None:
    batch = pack_examples(
        [Example("x", [5, 6], [False, True], 0, None), Example("y", [7, 8], [True, True], 0, None)]
    )
    assert batch.labels.tolist() == [6, -100, 8, -100]


@pytest.mark.parametrize("seed", range(5))
def test_packing_law(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 120, (500,), generator=generator).tolist()
    order = torch.randperm(500, generator=generator).tolist()
    batches = group_by_length(lengths, 100, order)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert all(sum(lengths[i] for i in batch) <= 100 or len(batch) == 1 for batch in batches)
    assert batches == group_by_length(lengths, 100, order)
    place = {index: at for at, index in enumerate(order)}
    assert all(place[a[0]] < place[b[0]] for a, b in pairwise(batches))  # nobody waits for ever
    short = [1 + length // 3 for length in lengths]
    assert (
        len(group_by_length(short, 100, order)) <= 1.02 * sum(short) / 100 + 1
    )  # nearly no room is left


def test_packing_fills_gaps_from_a_window_only() -> None:
    assert group_by_length([6, 6, 4, 4], 10, [0, 1, 2, 3]) == [[0, 2], [1, 3]]
    assert group_by_length([], 10, []) == []
    assert group_by_length([50], 10, [0]) == [[0]]
    far = [6] * 70 + [4]
    assert group_by_length(far, 10, range(71))[0] == [0]
    assert [6, 70] in group_by_length(far, 10, range(71))


def epoch_of(sampler: BatchSampler, first: int, steps: int) -> Iterator[list[int]]:
    for step in range(first, first + steps):
        for batch in sampler.step_batches(step):
            yield [int(batch.token_ids[start]) // 1000 for start in batch.cu_seqlens[:-1]]


def test_sampler_goes_over_every_row_each_epoch_and_resumes_anywhere() -> None:
    lengths = torch.randint(2, 30, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = make_examples(lengths)
    sampler = BatchSampler(examples, 64, 3, seed=7)
    steps = sampler.steps_per_epoch
    first = list(epoch_of(sampler, 0, steps))
    assert sorted(chain.from_iterable(first)) == list(range(1, 61))
    assert all(len(sampler.step_batches(step)) == 3 for step in range(steps - 1))
    end = next(n for n in range(steps, 3 * steps) if n + 1 == sampler._first_step_of(2))
    second = list(epoch_of(sampler, steps, end + 1 - steps))
    assert sorted(chain.from_iterable(second)) == list(range(1, 61))
    assert second != first
    fresh = BatchSampler(
        examples, 64, 3, seed=7
    )  # asked for a late step first, as a resumed run does
    for step in (2 * steps + 1, 0, steps, steps - 1):
        for ours, theirs in zip(fresh.step_batches(step), sampler.step_batches(step), strict=True):
            assert torch.equal(ours.token_ids, theirs.token_ids)
            assert ours.cu_seqlens == theirs.cu_seqlens
    assert list(epoch_of(BatchSampler(examples, 64, 3, seed=8), 0, steps)) != first
    with pytest.raises(DataError):
        BatchSampler([], 64, 1, 0)


# held-out rows


@pytest.mark.parametrize("seed", range(5))
def test_held_out_rows_share_nothing_with_training(seed: int) -> None:
    rows = [SFTRow(f"x:{n}", prompt=f"p{n % 40}", completion="c") for n in range(100)]
    train, held = train_eval_split(rows, 0.2, seed)
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in held)
    assert sorted([*train, *held], key=rows.index) == rows
    assert 15 <= len(held) <= 20
    assert train_eval_split(rows, 0.2, seed) == (train, held)
    assert held == sorted(held, key=rows.index)


def test_split_leaves_at_least_one_row_on_each_side() -> None:
    rows = [chat_row("a", "b"), *[chat_row("c", "d")] * 9]
    for share in (0.0, 0.1, 0.99):
        train, held = train_eval_split(rows, share, 0)
        assert train
        assert held
        assert contents(train[0]) != contents(held[0])
    for bad in ([], rows[:1], rows[1:]):
        with pytest.raises(DataError, match="at least 2 different rows"):
            train_eval_split(bad, 0.1, 0)
    with pytest.raises(AfinaError, match="an eval size of"):
        train_eval_split(rows, 1.0, 0)


def test_table_is_what_the_contract_says(write) -> None:
    table = read_sft(write("x.txt", "hello"))
    assert isinstance(table, Table)
    assert table.rows == [SFTRow(str(table.path) + ":1", text="hello")]
    assert table.digest == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
