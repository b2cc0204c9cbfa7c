"""Rows as other tools and languages have them: read as what they are, or refused with a way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afina.data.schemas import SFT, Schema, task_of
from afina.data.table import Table, detect_schema, read_table
from afina.errors import DataError

ROWS = range(12)


def _read(file: Path, columns: dict[str, Any] | None = None) -> Table[Any]:
    found = detect_schema(file, columns or {})
    schema: Schema[Any] = SFT if found is None else found.schema
    return read_table(file, schema, columns or {})


def _write(folder: Path, name: str, content: Any) -> Path:
    """Write a text, or rows as JSONL."""
    file = folder / name
    if not isinstance(content, str):
        rows = (json.dumps(content(n), ensure_ascii=False) for n in ROWS)
        content = "".join(row + "\n" for row in rows)
    file.write_text(content, encoding="utf-8")
    return file


# a row, and the start of the first reading that is proposed
PROPOSED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "German": (
        lambda n: {"Eingabe": f"Wie viel ist {n} plus eins?", "Ausgabe": f"Das ist {n + 1}."},
        "{prompt: Eingabe, completion: Ausgabe}",
    ),
    "French": (
        lambda n: {"réponse": f"Cela fait {n + 1}.", "consigne": f"Combien font {n} et un ?"},
        "{prompt: consigne, completion: réponse}",
    ),
    "Portuguese": (
        lambda n: {"resposta": f"São {n + 1}.", "pergunta": f"Quanto é {n} mais um?"},
        "{prompt: pergunta, completion: resposta}",
    ),
    "Italian": (
        lambda n: {"domanda": f"Quanto fa {n} più uno?", "risposta": f"Fa {n + 1}."},
        "{prompt: domanda, completion: risposta}",
    ),
    "Chinese": (
        lambda n: {"问": f"请把第{n}句话翻译成英文", "答": f"这是第{n}句话的英文翻译"},
        "{prompt: 问, completion: 答}",
    ),
    "a question with choices": (
        lambda n: {"question": f"Which is {n}?", "choices": ["one", f"{n}"], "answer": n % 2},
        '{prompt: "{question}\\n\\n{choices}", completion: answer}',
    ),
    "answers in an object": (
        lambda n: {
            "context": f"The lamp {n} is in the hall.",
            "question": f"Where is the lamp {n}?",
            "answers": {"text": [f"in the hall {n}"], "answer_start": [12]},
        },
        '{prompt: "{context}\\n\\n{question}", completion: answers.text}',
    ),
    "languages in an object": (
        lambda n: {"translation": {"nl": f"Het huis {n} is rood.", "es": f"La casa {n} es roja."}},
        "{prompt: translation.nl, completion: translation.es}",
    ),
    "several columns of 0 and 1": (
        lambda n: {
            "comment": f"this remark number {n}",
            "rude": n % 2,
            "false": 0,
            "ad": n % 3 // 2,
        },
        '--objective classify --columns \'{text: comment, label: [rude, "false", ad]}',
    ),
    "speakers as columns": (
        lambda n: {"user": f"Say the number {n} aloud", "assistant": "Here it is."},
        "{prompt: user, completion: assistant}",
    ),
}


@pytest.mark.parametrize("name", PROPOSED)
def test_the_first_reading_is_the_one_that_is_meant(name: str, tmp_path: Path) -> None:
    row, expected = PROPOSED[name]
    file = _write(tmp_path, "rows.jsonl", row)
    with pytest.raises(DataError) as caught:
        _read(file)
    assert expected in str(caught.value.hint).splitlines()[0], caught.value.hint


# a file, columns, and what the first row is
READ: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "flags of classes": (
        "a.jsonl",
        lambda n: {"text": f"film {n}", "labels": {"funny": 1, "sad": n % 2, "long": False}},
        {},
        "label=('funny',)",
    ),
    "a column for each class": (
        "b.csv",
        "text,funny,sad\n" + "".join(f"film {n},{n % 2},1\n" for n in ROWS),
        {"label": ["funny", "sad"]},
        "label=('sad',)",
    ),
    "names with spaces around them": (
        "c.csv",
        " prompt , completion\n" + "".join(f"say {n},{n}\n" for n in ROWS),
        {},
        "prompt='say 0', completion='0'",
    ),
    "the only text of a list": (
        "d.jsonl",
        lambda n: {"prompt": f"Where {n}?", "completion": [f"here {n}"]},
        {},
        "completion='here 0'",
    ),
    "a text in an object": (
        "e.jsonl",
        lambda n: {"t": {"nl": f"huis {n}", "es": f"casa {n}"}},
        {"prompt": "t.nl", "completion": "t.es"},
        "prompt='huis 0', completion='casa 0'",
    ),
    "the role model": (
        "f.jsonl",
        lambda n: {
            "messages": [{"role": "user", "content": f"{n}?"}, {"role": "model", "content": "y"}]
        },
        {},
        "'role': 'assistant'",
    ),
    "a list whose rows have one text": ("g.json", '[{"text": "one text"}]', {}, "text='one text'"),
}


@pytest.mark.parametrize("name", READ)
def test_rows_are_read_as_what_they_are(name: str, tmp_path: Path) -> None:
    file, content, columns, expected = READ[name]
    assert expected in repr(_read(_write(tmp_path, file, content), columns).rows[0])


# a file, columns, what is said, and what to do
REFUSED: dict[str, tuple[str, Any, dict[str, Any], str, str]] = {
    "spans": (
        "a.jsonl",
        lambda n: {"text": f"Ana {n}", "entities": [{"start": 0, "end": 3, "label": "PER"}]},
        {},
        "labels of parts of a text",
        "{entities: null}",
    ),
    "choices beside a prompt": (
        "b.jsonl",
        lambda n: {"prompt": f"Which {n}?", "completion": "a", "options": ["one", "two"]},
        {},
        "the choices of a question",
        '{prompt: "{prompt}\\n\\n{options}"}',
    ),
    "several answers a row": (
        "c.jsonl",
        lambda n: {"prompt": f"Say {n}", "responses": ["one", "two"], "scores": [1, 2]},
        {},
        "no known format",
        "responses has to be a text: one row for each answer",
    ),
    "texts that a reading would lose": (
        "d.jsonl",
        lambda n: {"query": f"capital {n}", "passages": {"passage_text": ["a b", "c d"]}},
        {},
        "no known format",
        "name the columns",
    ),
    "turns of another form": (
        "e.jsonl",
        lambda n: {"dialogue": [{"speaker": "user", "utterance": f"hello {n}"}]},
        {},
        "no known format",
        "the turns in dialogue need the keys role and content",
    ),
    "no header": (
        "f.tsv",
        "".join(f"good\tthis film number {n} was fine\n" for n in ROWS),
        {},
        "no known format",
        "the first line is a row",
    ),
    "two values of one key": (
        "g.jsonl",
        '{"prompt": "a", "completion": "b", "prompt": "c"}\n' * 3,
        {},
        "two values have the key 'prompt'",
        "another name",
    ),
    "two values of one key in a list": (
        "h.json",
        '[{"text": "a", "text": "b"}]',
        {},
        "two values have the key 'text'",
        "another name",
    ),
    "rows as lists": ("i.jsonl", '["q", "a"]\n["r", "b"]\n', {}, "found a list", ""),
    "YAML": ("j.yaml", "- prompt: a\n  completion: b\n", {}, "yaml files are not read", "j.txt"),
    "HTML": ("k.html", "<html><p>Hello</p></html>", {}, "html files are not read", "k.txt"),
    "a class column without 0 and 1": (
        "l.csv",
        "text,funny,sad\n" + "".join(f"film {n},2,1\n" for n in ROWS),
        {"label": ["funny", "sad"]},
        "expected 0 or 1, found '2'",
        "the classes that a row has",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_with_a_way_out(name: str, tmp_path: Path) -> None:
    file, content, columns, what, hint = REFUSED[name]
    with pytest.raises(DataError) as caught:
        _read(_write(tmp_path, file, content), columns)
    assert what in caught.value.what and hint in (caught.value.hint or ""), caught.value.hint


def test_flags_make_a_row_of_several_classes(tmp_path: Path) -> None:
    rows = _read(_write(tmp_path, "a.jsonl", READ["flags of classes"][1])).rows
    assert task_of(rows) == "multi-label"
