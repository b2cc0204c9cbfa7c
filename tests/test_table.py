"""One reader for every schema: containers, renamed columns, bad rows, and columns that were not read."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afina.data.schemas import (
    LABELED,
    PREFERENCE,
    PROMPT,
    ROW_SCHEMAS,
    SFT,
    Schema,
    class_names,
    prompt_key,
)
from afina.data.table import detect_schema, read_table
from afina.errors import DataError
from helpers import write_rows

USER = {"role": "user", "content": "who?"}
ME, YOU = {"role": "assistant", "content": "me"}, {"role": "assistant", "content": "you"}


@dataclass(frozen=True)
class Case:
    """A good row, a bad one and another good one, and what is wrong with the bad one."""

    schema: Schema[Any]
    format: str
    rows: list[dict[str, Any]]
    field: str  # where the error is; "" for the row
    what: str
    columns: dict[str, str] = field(default_factory=dict)


CASES = {
    "sft": Case(
        SFT,
        "prompt-completion",
        [
            {"prompt": "a", "completion": "b"},
            {"prompt": "c", "completion": " "},
            {"prompt": "d", "completion": "e"},
        ],
        "completion",
        "the field is empty",
    ),
    "chat": Case(
        SFT,
        "openai-chat",
        [{"messages": [USER, ME]}, {"messages": [USER]}, {"messages": [USER, YOU]}],
        "messages",
        "no assistant message",
    ),
    "alpaca": Case(
        SFT,
        "alpaca",
        [
            {"instruction": "a", "input": "b", "output": "c"},
            {"instruction": "a", "input": "b", "output": ""},
            {"instruction": "d", "input": "", "output": "e"},
        ],
        "output",
        "the field is empty",
    ),
    "text": Case(
        SFT, "text", [{"text": "a"}, {"text": " "}, {"text": "b"}], "text", "the field is empty"
    ),
    "pairs": Case(
        PREFERENCE,
        "pairs",
        [
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "chosen": "b", "rejected": " "},
            {"prompt": "d", "chosen": "e", "rejected": "f"},
        ],
        "rejected",
        "the field is empty",
    ),
    "full chats": Case(
        PREFERENCE,
        "pairs",
        [
            {"chosen": [USER, ME], "rejected": [USER, YOU]},
            {"chosen": [USER, ME], "rejected": [USER, ME]},
            {"chosen": [USER, YOU], "rejected": [USER, ME]},
        ],
        "",
        "the two answers are the same",
    ),
    "labels": Case(
        PREFERENCE,
        "labels",
        [
            {"prompt": "a", "completion": "b", "label": "true"},
            {"prompt": "a", "completion": "b", "label": "perhaps"},
            {"prompt": "c", "completion": "d", "label": "false"},
        ],
        "label",
        "a label is true (a good answer) or false",
    ),
    "prompts": Case(
        PROMPT,
        "prompts",
        [
            {"prompt": "a", "reference": "b"},
            {"prompt": " ", "reference": "c"},
            {"prompt": "d", "reference": "e"},
        ],
        "prompt",
        "the field is empty",
    ),
    "classes": Case(
        LABELED,
        "text",
        [{"text": "a", "label": "x"}, {"text": " ", "label": "x"}, {"text": "b", "label": "y"}],
        "text",
        "empty text",
    ),
}
PLACES = {
    ".json": ["row 1", "row 2", "row 3"],
    ".jsonl": ["1", "2", "3"],
    ".csv": ["2", "3", "4"],
    ".tsv": ["2", "3", "4"],
    ".parquet": ["row 1", "row 2", "row 3"],
}


def write_container(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format that the ending of the name stands for."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        write_rows(path, *rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            for row in rows:
                cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                writer.writerow(cells)


def contents(row: Any) -> dict[str, Any]:
    """What a row holds, without its place and the record that it came from."""
    return {name: value for name, value in vars(row).items() if name not in ("where", "item")}


@pytest.mark.parametrize("renamed", [False, True], ids=["own names", "renamed"])
@pytest.mark.parametrize("suffix", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_every_schema_reads_every_container(
    name: str, suffix: str, renamed: bool, tmp_path: Path
) -> None:
    case = CASES[name]
    if name == "full chats" and suffix in (".csv", ".tsv"):
        pytest.skip("two lists of messages are no cells of a CSV file")
    columns = {field: f"my_{field}" for field in case.rows[0]} if renamed else {}
    rows = [
        {columns.get(key, key): value for key, value in row.items()} | {"note": note}
        for row, note in zip(case.rows, ("x", "y", ""), strict=True)
    ]
    file, reference = tmp_path / f"rows{suffix}", tmp_path / "reference.jsonl"
    write_container(file, rows)
    write_rows(reference, case.rows[0], case.rows[2])

    table = read_table(file, case.schema, columns, skip_bad_rows=True)
    places = [f"{file}:{place}" for place in PLACES[suffix]]
    expected = read_table(reference, case.schema)
    assert [contents(row) for row in table.rows] == [contents(row) for row in expected.rows]
    assert [row.where for row in table.rows] == [places[0], places[2]]
    assert (table.format, expected.format) == (case.format, case.format)
    assert table.unused_columns == {"note": 1}  # of the rows that are used
    assert expected.unused_columns == {}

    with pytest.raises(DataError) as caught:
        read_table(file, case.schema, columns)
    assert caught.value.what == case.what
    where = str(caught.value.where)
    if case.field:
        assert where == f"{places[1]}:{columns.get(case.field, case.field)}"
        assert table.skipped == [f"{where}: {case.what}"]
    else:
        assert where.startswith(places[1])
        assert len(table.skipped) == 1


def test_plain_text_is_documents_or_prompts(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("prompt, please\nsay sol\n\n\nsay mar\n")
    assert [row.text for row in read_table(file, SFT).rows] == [
        "prompt, please\nsay sol",
        "say mar",
    ]
    prompts = read_table(file, PROMPT).rows
    assert [row.prompt for row in prompts] == ["prompt, please", "say sol", "say mar"]
    for schema in (PREFERENCE, LABELED):
        with pytest.raises(DataError, match="neither a pair|no column of labels"):
            read_table(file, schema)
    with pytest.raises(DataError, match="no column 'question'"):
        read_table(file, PROMPT, {"prompt": "question"})


def test_a_folder_is_images_with_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "pets" / name / "1.png")
    table = read_table(tmp_path / "pets", LABELED)
    assert (table.format, class_names(table.rows)) == ("pictures", ("cat", "dog"))
    assert [row.where for row in table.rows] == [
        str(tmp_path / "pets" / name / "1.png") for name in ("cat", "dog")
    ]
    assert table.unused_columns == {}
    for schema in (SFT, PREFERENCE, PROMPT):
        with pytest.raises(DataError, match="this is a folder"):
            read_table(tmp_path / "pets", schema)
    detected = detect_schema(tmp_path / "pets", {})
    assert detected is not None and detected.schema is LABELED


DETECTED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"text": "a", "label": 1}, {}, "classify"),
    ({"text": "a", "label": 1, "id": 3}, {}, "classify"),
    ({"sentence": "a", "label": "x"}, {}, "classify"),
    ({"body": "a", "kind": "x"}, {"text": "body", "label": "kind"}, "classify"),
    ({"prompt": "a", "label": 1}, {}, "auto"),
    ({"prompt": "a", "completion": "b", "label": True}, {}, "kto"),
    ({"prompt": "a", "completion": "b", "label": 1}, {}, "auto"),
    ({"instruction": "a", "input": "b", "output": "c"}, {}, "auto"),
    ({"instruction": "a", "input": "b", "output": "c", "kto_tag": False}, {}, "kto"),
    ({"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"}, {}, "dpo"),
    (
        {"input": {"messages": [USER]}, "preferred_output": [ME], "non_preferred_output": [YOU]},
        {},
        "dpo",
    ),
    ({"prompt": "a", "good": "b", "bad": "c"}, {"chosen": "good", "rejected": "bad"}, "dpo"),
    ({"messages": [USER, ME]}, {}, "auto"),
]


@pytest.mark.parametrize(("row", "columns", "objective"), DETECTED)
def test_the_first_row_selects_the_objective(
    row: dict[str, Any], columns: dict[str, str], objective: str, tmp_path: Path
) -> None:
    detected = detect_schema(write_rows(tmp_path / "a.jsonl", row), columns)
    found = "auto" if detected is None else detected.schema.objective(detected.format)
    assert found == objective


def test_a_value_under_the_fields_own_name_is_preferred(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "a.jsonl",
        {"text": "a", "sentence": "a", "label": "x"},
        {"text": "", "sentence": "c", "label": "", "class": "y"},
    )
    table = read_table(file, LABELED)
    assert [(row.content, row.label) for row in table.rows] == [("a", "x"), ("c", "y")]
    assert table.unused_columns == {"sentence": 1}


def test_columns_that_no_row_reads_are_counted(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "a.jsonl",
        {"text": "my parcel is late", "team": "delivery", "score": None},
        {"text": "the lamp is broken", "team": "repair", "score": 3},
    )
    assert read_table(file, SFT).unused_columns == {"team": 2, "score": 1}


REFUSED: list[tuple[Schema[Any], dict[str, Any], str, Any, str]] = [
    (SFT, {"prompt": "a b", "completion": "c"}, "label", True, "--objective kto"),
    (SFT, {"prompt": "a b", "completion": "c"}, "label", "good", "{label: null}"),
    (SFT, {"prompt": "a b", "completion": "c"}, "context", "some words", "{context}\\n\\n{prompt}"),
    (SFT, {"prompt": "a b", "completion": "c"}, "explicación", "some words", "{explicación: null}"),
    (SFT, {"prompt": "a b", "completion": "c"}, "sample_weight", 0.5, "{sample_weight: null}"),
    (SFT, {"prompt": "a b", "completion": "c"}, "images", ["a.png"], "{images: null}"),
    (SFT, {"instruction": "a b", "output": "c"}, "rejected", "some words", "{rejected: null}"),
    (SFT, {"text": "some words"}, "input_ids", [1, 2], "{input_ids: null}"),
    (LABELED, {"text": "a b", "label": "x"}, "note_text", "other words", "{text_pair: note_text}"),
    (PREFERENCE, {"prompt": "a", "chosen": "b", "rejected": "c"}, "margin_weight", 2, "null}"),
    (
        PREFERENCE,
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "sys_prompt",
        "be kind",
        "system:",
    ),
]


@pytest.mark.parametrize(("schema", "row", "name", "value", "hint"), REFUSED)
def test_a_column_whose_name_has_a_meaning_is_not_dropped(
    schema: Schema[Any], row: dict[str, Any], name: str, value: Any, hint: str, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "a.jsonl", row, row | {name: value})
    with pytest.raises(DataError) as caught:
        read_table(file, schema)
    assert caught.value.where == f"{file}:2:{name}"
    assert hint in str(caught.value.hint)
    table = read_table(file, schema, {name: None})  # what the hint says, typed
    assert len(table.rows) == 2 and table.unused_columns == {}


def test_a_column_that_repeats_what_is_read_is_only_named(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "who are you?"}, {"role": "assistant", "content": "me"}]
    worse = [chat[0], {"role": "assistant", "content": "nobody at all"}]
    for schema, row, name in (
        (SFT, {"messages": chat, "prompt": "who are you?"}, "prompt"),
        (SFT, {"instruction": "add 1 2", "output": "3", "text": "### add 1 2\n### 3"}, "text"),
        (
            PREFERENCE,
            {"prompt": "who are you?", "chosen": chat, "rejected": worse, "messages": chat},
            "messages",
        ),
    ):
        file = write_rows(tmp_path / "a.jsonl", row)
        assert read_table(file, schema).unused_columns == {name: 1}


def test_keys_of_turns_are_read_named_or_refused(tmp_path: Path) -> None:
    def read(**more: Any) -> dict[str, int]:
        file = write_rows(tmp_path / "a.jsonl", {"messages": [USER, ME | more]})
        return read_table(file, SFT).unused_columns

    assert read(timestamp=12, id="x") == {"messages.timestamp": 1, "messages.id": 1}
    for name, value in (("rationale", "it is me"), ("images", ["a.png"]), ("train", False)):
        with pytest.raises(DataError, match=f"messages.{name}"):
            read(**{name: value})


def test_a_label_next_to_a_text_is_named_where_the_text_alone_is_read(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", {"text": "some words", "label": "x"})
    assert read_table(file, SFT).unused_columns == {"label": 1}


def test_own_schemas_are_registered() -> None:
    for schema in (SFT, PREFERENCE, PROMPT, LABELED):
        assert ROW_SCHEMAS.get(schema.name) is type(schema)
    assert ROW_SCHEMAS.names() == [
        "embedding",
        "labeled",
        "preference",
        "prompt",
        "relevance",
        "sft",
        "tagged",
    ]


def test_rows_of_one_prompt_have_one_key(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", *CASES["pairs"].rows[::2])
    pairs, prompts = (read_table(file, schema).rows for schema in (PREFERENCE, PROMPT))
    assert [prompt_key(row) for row in pairs] == [prompt_key(row) for row in prompts]


def test_two_chats_as_texts_are_split_at_the_last_shared_turn(tmp_path: Path) -> None:
    begin = "\n\nHuman: Who are you?\n\nAssistant: A bot.\n\nHuman: And who am I?\n\nAssistant:"
    file = write_rows(
        tmp_path / "a.jsonl",
        {"chosen": f"{begin} You are Ana.", "rejected": f"{begin} You are it."},
    )
    table = read_table(file, PREFERENCE)
    (row,) = table.rows
    assert [m["content"] for m in row.prompt if isinstance(m, dict)] == [
        "Who are you?",
        "A bot.",
        "And who am I?",
    ]
    assert (row.chosen, row.rejected) == tuple(
        ({"role": "assistant", "content": text},) for text in ("You are Ana.", "You are it.")
    )
    assert "split at the last turn that both have" in table.rule
    alone = write_rows(tmp_path / "b.jsonl", {"chosen": "You are Ana.", "rejected": "You are it."})
    with pytest.raises(DataError, match="do not begin alike"):
        read_table(alone, PREFERENCE)


def test_answers_that_repeat_their_prompt_are_read_without_it(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "Greet n"}, {"role": "assistant", "content": "Good day."}]
    bad = [good[0], {"role": "assistant", "content": "What?"}]
    base = {"prompt": "Greet n", "messages": good, "prompt_id": "7", "score_chosen": 8.5}
    for chosen, rejected in ((good, bad), ("Greet n Good day.", "Greet n What?")):
        file = write_rows(tmp_path / "a.jsonl", base | {"chosen": chosen, "rejected": rejected})
        table = read_table(file, PREFERENCE)
        row = table.rows[0]
        assert row.prompt == "Greet n"
        assert [str(a).count("Greet") for a in (row.chosen, row.rejected)] == [0, 0]
        assert "Good day." in str(row.chosen) and table.rule == "the prompt is in its own column"


def test_tools_are_part_of_every_kind_of_row(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    for schema, row in (
        (SFT, {"prompt": "a b", "completion": "c"}),
        (SFT, {"instruction": "a b", "output": "c"}),
        (SFT, {"messages": [USER, ME]}),
        (PREFERENCE, {"prompt": "a b", "chosen": "c", "rejected": "d"}),
        (PROMPT, {"prompt": "a b"}),
    ):
        table = read_table(write_rows(tmp_path / "a.jsonl", row | {"tools": [tool]}), schema)
        assert table.rows[0].tools == (tool,) and table.unused_columns == {}
        if schema is PREFERENCE:
            assert table.rows[0].row(table.rows[0].chosen).tools == (tool,)
