"""Tables as people have them: each proposed reading is the right one, and its command can be typed."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from afina.data.proposals import CLOSE, SIMILAR, describe_columns, propose
from afina.data.schemas import EMBEDDING, LABELED, PREFERENCE, SFT
from afina.data.table import detect_schema, read_table
from afina.errors import DataError
from helpers import write_rows

ASKED = [
    "Where is the parcel that I ordered?",
    "Why does the lamp not shine any more?",
    "When does the shop open on Sunday?",
    "How do I send the shoes back?",
    "Who pays for the broken window?",
    "Which colours can the blue chair have?",
    "What does the big table cost today?",
    "Can the sofa be delivered next week?",
]
SAID = [
    "It left the store this morning already.",
    "Please put a new bulb into it.",
    "We open the doors at ten.",
    "A label for that is in the box.",
    "The insurance of the carrier pays it.",
    "All that the catalogue shows on page nine.",
    "It costs forty less than last year.",
    "Yes, the van comes by on Tuesday.",
]
MORE = [
    f"Some more words about matter number {n} of all."
    for n in ("one", "two", "six", "ten", "red", "big", "old", "new")
]
FEW = ["repair", "delivery", "repair", "delivery", "shop", "repair", "shop", "delivery"]
NAMES = ["Kim", "Lee", "Ana", "Eva", "Bob", "Joe", "Max", "Sam"]
NUMBERS = [3, 14, 15, 92, 65, 35, 89, 79]
STARS = [1, 5, 4, 1, 5, 4, 1, 5]
SHARES = [0.1, 0.75, 0.5, 0.25, 0.9, 0.33, 0.6, 0.8]
IDS = [f"A-{n:04d}" for n in range(8)]
LINKS = [f"https://example.org/{n}" for n in range(8)]
LISTS = [["a", "b"], ["b"], ["a"], ["c", "a"], ["b"], ["a"], ["c"], ["a", "b"]]
TRUE = [True, False, True, True, False, False, True, False]
DATES = [f"2024-03-{n:02d}" for n in range(1, 9)]

# columns of a table, and what the first reading has to be
TABLES: list[tuple[dict[str, list[Any]], dict[str, Any]]] = [
    ({"question": ASKED, "answer": SAID}, {"prompt": "question", "completion": "answer"}),
    ({"answer": SAID, "question": ASKED}, {"prompt": "question", "completion": "answer"}),
    (
        {"ticket": NUMBERS, "customer_text": ASKED, "agent": NAMES, "reply": SAID},
        {"prompt": "customer_text", "completion": "reply"},
    ),
    ({"pregunta": ASKED, "respuesta": SAID}, {"prompt": "pregunta", "completion": "respuesta"}),
    (
        {"id": IDS, "respuesta_agente": SAID, "texto_cliente": ASKED},
        {"prompt": "texto_cliente", "completion": "respuesta_agente"},
    ),
    (
        {"id": NUMBERS, "user_message": ASKED, "bot_response": SAID},
        {"prompt": "user_message", "completion": "bot_response"},
    ),
    (
        {"Consulta": ASKED, "Contestación": SAID},
        {"prompt": "Consulta", "completion": "Contestación"},
    ),
    (
        {"title": ASKED, "url": LINKS, "summary": SAID},
        {"prompt": "title", "completion": "summary"},
    ),
    ({"document": MORE, "summary": SAID}, {"prompt": "document", "completion": "summary"}),
    ({"artículo": MORE, "resumen": SAID}, {"prompt": "artículo", "completion": "resumen"}),
    (
        {"context": MORE, "question": ASKED, "answer": SAID},
        {"prompt": "{context}\n\n{question}", "completion": "answer"},
    ),
    (
        {"question": ASKED, "response": SAID, "passage": MORE, "score": SHARES},
        {"prompt": "{passage}\n\n{question}", "completion": "response"},
    ),
    (
        {"subject": SAID, "body": MORE, "reply": ASKED, "date": DATES},
        {"prompt": "{subject}\n\n{body}", "completion": "reply"},
    ),
    (
        {"system_prompt": MORE, "question": ASKED, "response": SAID},
        {"prompt": "question", "system": "system_prompt", "completion": "response"},
    ),
    (
        {"instruction": ASKED, "response": SAID},
        {"instruction": "instruction", "output": "response"},
    ),
    (
        {"instruction": ASKED, "input": MORE, "answer": SAID},
        {"instruction": "instruction", "input": "input", "output": "answer"},
    ),
    (
        {"question": ASKED, "category": FEW, "answer": SAID},
        {"prompt": "question", "completion": "answer"},
    ),
    (
        {"question": ASKED, "answer": SAID, "votes": NUMBERS, "tags": LISTS},
        {"prompt": "question", "completion": "answer"},
    ),
    ({"source": ASKED, "target": SAID}, {"prompt": "source", "completion": "target"}),
    ({"English": ASKED, "translation": SAID}, {"prompt": "English", "completion": "translation"}),
    (
        {"original_text": ASKED, "rewrite": SAID},
        {"prompt": "original_text", "completion": "rewrite"},
    ),
    ({"human": ASKED, "assistant": SAID}, {"prompt": "human", "completion": "assistant"}),
    ({"Q": ASKED, "A": SAID}, {"prompt": "Q", "completion": "A"}),
    (
        {"answer_id": NUMBERS, "query": ASKED, "output_text": SAID},
        {"prompt": "query", "completion": "output_text"},
    ),
    (
        {"problem": ASKED, "solution": SAID, "level": FEW},
        {"prompt": "problem", "completion": "solution"},
    ),
    (
        {"fecha_respuesta": DATES, "consulta": ASKED, "salida": SAID},
        {"prompt": "consulta", "completion": "salida"},
    ),
    (
        {"question": ASKED, "rationale": MORE, "answer": SAID},
        {"prompt": "question", "completion": "answer"},
    ),
    ({"text": ASKED, "category": FEW}, {"text": "text", "label": "category"}),
    ({"text": ASKED, "team": FEW}, {"text": "text", "label": "team"}),
    ({"texto": ASKED, "etiqueta": FEW}, {"text": "texto", "label": "etiqueta"}),
    ({"id": IDS, "message": ASKED, "intent": FEW}, {"text": "message", "label": "intent"}),
    ({"review": ASKED, "sentiment": FEW, "id": NUMBERS}, {"text": "review", "label": "sentiment"}),
    ({"sentimiento": FEW, "reseña": ASKED}, {"text": "reseña", "label": "sentimiento"}),
    ({"tweet": ASKED, "is_spam": TRUE, "class": FEW}, {"text": "tweet", "label": "class"}),
    ({"comment": ASKED, "toxic": TRUE}, {"text": "comment", "label": "toxic"}),
    (
        {"mensaje": ASKED, "prioridad": FEW, "fecha": DATES},
        {"text": "mensaje", "label": "prioridad"},
    ),
    ({"review": ASKED, "stars": STARS, "user": NAMES}, {"text": "review", "label": "stars"}),
    ({"zzz": FEW, "qqq": ASKED}, {"text": "qqq", "label": "zzz"}),
    ({"description": ASKED, "genres": LISTS}, {"text": "description", "label": "genres"}),
    (
        {"premise": ASKED, "hypothesis": SAID, "label": FEW},
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
    ),
    (
        {"sentence1": ASKED, "sentence2": SAID, "class": FEW},
        {"text": "sentence1", "text_pair": "sentence2", "label": "class"},
    ),
    (
        {"sentence1": ASKED, "sentence2": SAID, "similarity": SHARES},
        {"text": "sentence1", "text_pair": "sentence2", "label": "similarity"},
    ),
    ({"essay_text": ASKED, "score": SHARES}, {"text": "essay_text", "label": "score"}),
    (
        {"question": ASKED, "better": SAID, "worse": MORE},
        {"prompt": "question", "chosen": "better", "rejected": "worse"},
    ),
    (
        {"pregunta": ASKED, "respuesta_elegida": SAID, "respuesta_rechazada": MORE},
        {"prompt": "pregunta", "chosen": "respuesta_elegida", "rejected": "respuesta_rechazada"},
    ),
    (
        {
            "query": ASKED,
            "chosen_response": SAID,
            "rejected_response": MORE,
            "chosen_score": NUMBERS,
        },
        {"prompt": "query", "chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    ({"body": MORE, "id": IDS}, {"text": "body"}),
    ({"contenido": MORE, "autor": NAMES, "url": LINKS}, {"text": "contenido"}),
]


def make_table(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(("columns", "meaning"), TABLES, ids=[" ".join(c) for c, _ in TABLES])
def test_first_reading_is_what_the_columns_mean(
    columns: dict[str, list[Any]], meaning: dict[str, Any], tmp_path: Path
) -> None:
    records = make_table(columns)
    for rows in (records, [dict(reversed(r.items())) for r in records], records[:2]):
        first = propose(rows)[0]
        assert first.columns == meaning
    file = write_rows(tmp_path / "a b.jsonl", *records)
    for proposal in propose(records):  # each command can be typed, and leads to rows
        _, verb, path, *flags = shlex.split(proposal.command(file))
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        mapping = yaml.safe_load(given.get("--columns", "{}"))
        schemas: dict[str, Any] = {"classify": LABELED, "embed": EMBEDDING}
        schemas |= dict.fromkeys(("dpo", "kto"), PREFERENCE)
        schema = schemas.get(given.get("--objective", ""), SFT)
        assert verb == "plan" and len(read_table(Path(path), schema, mapping).rows) == 8
        assert "«" in proposal.example(records[0])


@pytest.mark.parametrize("columns", [columns for columns, _ in TABLES])
def test_numbers_lists_and_identifiers_are_no_texts(columns: dict[str, list[Any]]) -> None:
    kinds = {c.name: c.kind for c in describe_columns(make_table(columns))}
    for proposal in propose(make_table(columns)):
        for field in ("prompt", "completion", "text", "text_pair", "chosen", "rejected"):
            named = [n for n in kinds if n in (str(proposal.columns.get(field)).split("{") or [])]
            named += [n for n in kinds if f"{{{n}}}" in str(proposal.columns.get(field))]
            assert all(kinds[name] == "text" for name in named)


@pytest.mark.parametrize("other", ["category", "class", "team", "reply", "label_name", "zzz"])
def test_text_beside_another_column_asks(other: str, tmp_path: Path) -> None:
    values = {"reply": SAID}.get(other, FEW)
    file = write_rows(tmp_path / "a.jsonl", *make_table({"text": ASKED, other: values, "id": IDS}))
    with pytest.raises(DataError, match="more than one way") as caught:
        detect_schema(file, {})
    hint = str(caught.value.hint)
    assert "--objective pretrain" in hint and other in hint and ASKED[0] in hint
    assert detect_schema(file, {"text": "text"}) is None  # no question is left


def test_text_beside_names_without_meaning_is_text(tmp_path: Path) -> None:
    table = make_table({"text": ASKED, "id": IDS, "url": LINKS, "score": NUMBERS, "date": DATES})
    file = write_rows(tmp_path / "a.jsonl", *table)
    assert detect_schema(file, {}) is None  # nothing to ask
    assert read_table(file, SFT).unused_columns == dict.fromkeys(("id", "url", "score", "date"), 8)


def test_columns_of_which_nothing_is_known_are_listed_with_their_kinds(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", *make_table({"n1": NUMBERS, "w": LISTS, "k": IDS}))
    with pytest.raises(DataError) as caught:
        read_table(file, SFT)
    assert "n1 (number), w (list), k (identifier)" in str(caught.value.why)
    assert "COLUMN" in str(caught.value.hint)
    assert json.dumps(LISTS[0]) not in str(caught.value.hint)


DEGREES = [n / 10 for n in range(8)]


@pytest.mark.parametrize(
    ("columns", "kinds"),
    [
        (
            {"sentence1": ASKED, "sentence2": SAID, "score": DEGREES},
            ["a number to predict", SIMILAR],
        ),
        ({"sentence1": ASKED, "sentence2": SAID}, ["prompt and completion", CLOSE, "plain text"]),
        ({"query": ASKED, "passage": SAID}, ["prompt and completion", CLOSE, "plain text"]),
        ({"question": ASKED, "answer": SAID}, ["prompt and completion", CLOSE, "plain text"]),
    ],
)
def test_two_texts_are_also_proposed_as_embeddings(
    columns: dict[str, list[Any]], kinds: list[str], tmp_path: Path
) -> None:
    found = propose(make_table(columns))
    assert [one.kind for one in found][: len(kinds)] == kinds
    file = write_rows(tmp_path / "a.jsonl", *make_table(columns))
    close = next(one for one in found if one.objective == "embed")
    assert f"afina plan {file} --objective embed" in close.command(file)
    assert read_table(file, EMBEDDING, close.columns).rows[0].anchor == ASKED[0]
