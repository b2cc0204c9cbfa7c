"""Readings of a table whose columns no schema knows: up to three, each with an example to compare.

A reading follows from what the names of columns mean and from their values: few different values
are classes; numbers, lists and identifiers are neither prompt nor answer. The order of columns
decides only the order in which texts are joined.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, ColumnTemplate, columns_flag, is_blank, list_columns
from afina.data.names import (
    ANSWER,
    CHOSEN,
    CONTEXT,
    LABEL,
    PROMPT,
    REJECTED,
    SCORE,
    SYSTEM,
    TEXT,
    UNKNOWN,
    meaning_of,
    refused_meaning,
    split_name,
)
from afina.errors import DataError

MAX_PROPOSALS = 3
MAX_EXAMPLE = 100  # characters of a value in an example
MIN_FILLED = 0.2  # ratio of rows in which a column must have a value to be proposed as a text
SAMPLE = 1000  # records whose values are looked at
_INTEGER, _FLOAT = (
    re.compile(r"[+-]?\d+"),
    re.compile(r"[+-]?(\d+[.,]\d*|[.,]\d+)(e[+-]?\d+)?%?", re.I),
)
_IDENTIFIER = re.compile(
    r"[0-9a-f]{8,}|[0-9a-f]{8}-[0-9a-f-]{20,}|\w+://\S+|www\.\S+|[\w.+-]+@[\w-]+\.\w+"
    r"|(/[\w.-]+){2,}|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T][\d:.]+(Z|[+-][\d:]+)?)?|[\d:]+:\d+"
    r"|#?[A-Za-z]{0,8}[-_#:]?\d+([-_]\d+)*",
    re.I,
)
_BOOLEAN = {"true", "false", "yes", "no", "si", "sí"}
_HEADS = {"title", "titulo", "subject", "asunto", "headline"}  # what stands above a text
_FIRST, _SECOND = {"premise", "premisa"}, {"hypothesis", "hipotesis", "pair"}
_FIELD_ROLES = {
    "prompt": PROMPT,
    "instruction": PROMPT,
    "completion": ANSWER,
    "output": ANSWER,
    "system": SYSTEM,
    "text": TEXT,
    "text_pair": TEXT,
    "label": LABEL,
    "chosen": CHOSEN,
    "rejected": REJECTED,
}


@dataclass(frozen=True)
class Column:
    """A column of a table: what its name means, and of what kind its values are."""

    name: str
    role: str
    kind: str  # text, number, fraction, boolean, identifier, list, object, bytes or mixed
    values: list[Any]

    @property
    def num_words(self) -> float:
        """Mean number of words of its values."""
        return sum(len(str(v).split()) for v in self.values) / max(1, len(self.values))

    @property
    def num_distinct(self) -> int:
        """Number of different values."""
        return len({repr(value) for value in self.values})

    @property
    def is_prose(self) -> bool:
        """Whether it holds texts of some words that mostly differ."""
        return self.kind == "text" and self.num_words >= 3 and not self.has_few_values

    @property
    def has_few_values(self) -> bool:
        """Whether its values repeat as those of a class do; unknown of fewer than six rows."""
        return len(self.values) >= 6 and self.num_distinct <= min(100, len(self.values) / 2)

    @property
    def can_be_label(self) -> bool:
        """Whether its values can be classes, or sets of them."""
        if len(self.values) > 2 and self.num_distinct < 2:
            return False  # the same in all rows
        few = self.has_few_values or len(self.values) < 6
        if self.kind == "list":
            return all(isinstance(item, str) for value in self.values for item in value)
        if self.kind == "number":
            return few
        return self.kind == "boolean" or (self.kind == "text" and (few or self.num_words < 3))


def describe_columns(
    records: Sequence[Mapping[str, Any]], given: Mapping[str, Any] | None = None
) -> list[Column]:
    """Return the columns of records in order of appearance; `given` is that of `--columns`."""
    values: dict[str, list[Any]] = {}
    for record in records[:SAMPLE]:
        for name, value in record.items():
            kept = values.setdefault(str(name), [])
            kept += [] if is_blank(value) else [value]
    roles: dict[str, str | None] = {
        column: _FIELD_ROLES.get(field)
        for field, column in (given or {}).items()
        if isinstance(column, str)
    }
    lower = {name.lower() for name in values}
    if {"q", "a"} <= lower:
        roles = {**dict.fromkeys((n for n in values if n.lower() == "a"), ANSWER), **roles}
    return [
        Column(name, roles.get(name) or meaning_of(name), _kind_of_values(own), own)
        for name, own in values.items()
    ]


def _kind_of_values(values: Sequence[Any]) -> str:
    kinds = [_kind_of_value(value) for value in values]
    if not kinds:
        return "empty"
    found = set(kinds)
    if found <= {"number", "fraction"}:
        return "fraction" if "fraction" in found else "number"
    if found <= {"text", "boolean"} and "text" in found:
        return "text"
    main = max(found, key=kinds.count)
    return main if kinds.count(main) >= 0.9 * len(kinds) else "mixed"


def _kind_of_value(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "number"), (float, "fraction"), (list, "list")):
        if isinstance(value, kind):
            return name
    if not isinstance(value, str):
        return "bytes" if isinstance(value, bytes) else "object"
    text = value.strip()
    if text.lower() in _BOOLEAN:
        return "boolean"
    patterns = ((_INTEGER, "number"), (_FLOAT, "fraction"), (_IDENTIFIER, "identifier"))
    return next((name for pattern, name in patterns if pattern.fullmatch(text)), "text")


@dataclass(frozen=True)
class Proposal:
    """One reading of a table."""

    kind: str
    columns: dict[str, Any]
    objective: str | None
    answer: str  # field of which the value is learned; "" where all is
    unread: dict[str, None] = field(default_factory=dict)

    def command(self, path: Path) -> str:
        """Return the command that reads the table so."""
        columns = {f: c for f, c in self.columns.items() if f != c} | self.unread
        parts = ["afina plan", shlex.quote(str(path))]
        parts += [f"--objective {self.objective}"] if self.objective else []
        parts += [columns_flag(columns)] if columns else []
        return " ".join(parts)

    def example(self, record: Mapping[str, Any]) -> str:
        """Return a record in this reading, what is learned between « and »."""
        values = {name: _shorten(_value(column, record)) for name, column in self.columns.items()}
        if not self.answer:
            return "«" + " ".join(values.values()) + "»"
        mark = "better: " if self.kind == PAIRS else ""
        shown = [v for name, v in values.items() if name not in (self.answer, "rejected", "label")]
        end = f" worse: {values['rejected']}" if self.kind == PAIRS else ""
        return f"{' | '.join(shown)} -> {mark}«{values[self.answer]}»{end}"


PAIRS, CLASSES, NUMBERS = "pairs of answers", "classes", "a number to predict"
COMPLETION, PLAIN, RATED = "prompt and completion", "plain text", "good and bad answers"
CLOSE, SIMILAR = "texts that belong together", "similarity of two texts"


def _value(column: Any, record: Mapping[str, Any]) -> str:
    if isinstance(column, str) and column in record:
        return str(record[column])
    return str(ColumnTemplate(column).render(record))


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_EXAMPLE else line[:MAX_EXAMPLE] + "..."


def propose(
    records: Sequence[Mapping[str, Any]], given: Mapping[str, Any] | None = None
) -> list[Proposal]:
    """Return up to three readings of a table, the likeliest first; none where nothing is known."""
    columns = [c for c in describe_columns(records, given) if c.values]
    num_rows = len(records[:SAMPLE])
    texts = [c for c in _find_texts(columns) if len(c.values) >= MIN_FILLED * num_rows]
    answers = [column for column in texts if column.role == ANSWER]
    labels = _find_labels(columns, texts)
    answered = _completions(columns, texts, answers)
    classes = [p for label in labels for p in _classes(label, texts)]
    plain = _plain([column for column in texts if column not in labels])
    found = _pairs(columns, texts) + _rated(columns, texts, answers)
    close = _embeddings(texts, labels)
    if answered:
        found += [*answered, *classes[:1], *close]
    elif classes:
        found += [*classes[:1], *close, *classes[1:2], *_labels_as_text(labels, texts)]
    else:
        found += _unsure(texts, close)
    found = [*found[: MAX_PROPOSALS - bool(plain)], *plain]
    return [_with_unread(p, columns) for p in found[:MAX_PROPOSALS]]


def _find_texts(columns: Sequence[Column]) -> list[Column]:
    """Return the texts of a table; where there are sentences, single words are names or remarks."""
    texts = [column for column in columns if _is_text(column)]
    has_prose = any(column.is_prose for column in texts)
    return [c for c in texts if not has_prose or c.role == ANSWER or c.num_words >= 2]


def _is_text(column: Column) -> bool:
    if column.role == ANSWER and column.kind in ("number", "fraction"):
        return True  # the answers to sums: by its name it is nothing else
    if column.kind != "text":
        return False
    if column.role in (ANSWER, PROMPT, CONTEXT, TEXT):
        return not (column.has_few_values and column.num_distinct < 2)
    is_source = split_name(column.name) in (("source",), ("original",))
    return column.is_prose and (column.role == UNKNOWN or is_source)


def _rank(column: Column) -> int:
    """Where a text stands among those that are put together."""
    if set(split_name(column.name)) & _HEADS:
        return 0
    return {CONTEXT: 1, TEXT: 2, PROMPT: 4, ANSWER: 5}.get(column.role, 3)


def _order_in_pair(column: Column) -> tuple[int, int, str]:
    """Where a text stands in a pair: what is questions or given first, then by number or letter."""
    words = split_name(column.name)
    is_second = bool(set(words) & _SECOND) or column.role in (CONTEXT, ANSWER)
    is_first = column.role == PROMPT or bool(set(words) & _FIRST)
    number = words[-1] if words[-1].isdigit() or len(words[-1]) == 1 else ""
    return (0 if is_first else 2 if is_second else 1, _rank(column), number)


def _join(columns: Sequence[Column]) -> str:
    """Return the template of several texts, or the column where there is one."""
    ordered = sorted(columns, key=_rank)
    return columns[0].name if len(columns) == 1 else "\n\n".join(f"{{{c.name}}}" for c in ordered)


def _prompt_fields(columns: Sequence[Column], parts: Sequence[Column]) -> dict[str, Any]:
    names = {column.name for column in parts}
    if "instruction" in names and names <= {"instruction", "input"}:  # Alpaca's, `input` optional
        there = {c.name for c in columns if all(isinstance(value, str) for value in c.values)}
        fields: dict[str, Any] = {n: n for n in ("instruction", "input") if n in there}
    else:
        fields = {"prompt": _join(parts)}
    system = next((c.name for c in columns if c.role == SYSTEM and c.kind == "text"), None)
    return fields | ({"system": system} if system else {})


def _completions(
    columns: Sequence[Column], texts: Sequence[Column], answers: Sequence[Column]
) -> list[Proposal]:
    """Return one reading per column of answers, with all other texts as the prompt."""
    found = []
    for answer in answers:
        parts = [c for c in texts if c.role != ANSWER and not c.has_few_values]
        if parts:
            fields = _prompt_fields(columns, parts)
            name = "output" if "instruction" in fields else "completion"
            found.append(Proposal(COMPLETION, fields | {name: answer.name}, None, name))
    return found


def _pairs(columns: Sequence[Column], texts: Sequence[Column]) -> list[Proposal]:
    answers = [
        next((c for c in columns if c.role == role and c.kind in ("text", "list", "object")), None)
        for role in (CHOSEN, REJECTED)
    ]
    if None in answers:
        return []
    better, worse = (column.name for column in answers if column is not None)
    prompt = [c for c in texts if c.role != ANSWER and not c.has_few_values]
    fields = _prompt_fields(columns, prompt) if prompt else {}
    return [Proposal(PAIRS, fields | {"chosen": better, "rejected": worse}, "dpo", "chosen")]


def _rated(
    columns: Sequence[Column], texts: Sequence[Column], answers: Sequence[Column]
) -> list[Proposal]:
    """Return answers with a column of true or false."""
    rates = [c for c in columns if c.kind == "boolean" and c.role in (LABEL, CHOSEN)]
    parts = [c for c in texts if c.role != ANSWER]
    if len(answers) != 1 or len(rates) != 1 or not parts:
        return []
    if {str(v).strip().lower() for v in rates[0].values} - {"true", "false"}:
        return []
    fields = {"prompt": _join(parts), "completion": answers[0].name, "label": rates[0].name}
    return [Proposal(RATED, fields, "kto", "completion")]


def _find_labels(columns: Sequence[Column], texts: Sequence[Column]) -> list[Column]:
    """Return the columns that can be labels: by their names, else by their values."""
    named = [c for c in columns if c.role == LABEL and c.can_be_label]
    scores = [c for c in columns if c.role in (SCORE, LABEL) and c.kind == "fraction"]
    named = [c for c in columns if c in named or c in scores]
    if named:
        return sorted(named, key=lambda c: split_name(c.name) not in (("label",), ("etiqueta",)))
    prose = [c for c in texts if c.is_prose]
    unnamed = [c for c in columns if c.role == UNKNOWN and c not in prose and c.can_be_label]
    return [c for c in unnamed if c.has_few_values or (prose and c.num_words < 3)]


def _classes(label: Column, texts: Sequence[Column]) -> list[Proposal]:
    parts = sorted((c for c in texts if c is not label), key=_rank)
    if not parts or (label.kind == "text" and label in texts and len(texts) < 2):
        return []
    fields: dict[str, Any] = {"text": parts[0].name, "label": label.name}
    if len(parts) == 2:
        first, second = sorted(parts, key=_order_in_pair)
        fields = {"text": first.name, "text_pair": second.name, "label": label.name}
    elif len(parts) > 2:
        fields["text"] = _join(parts)
    kind = NUMBERS if label.kind == "fraction" else CLASSES
    return [Proposal(kind, fields, "classify", "label")]


def _labels_as_text(labels: Sequence[Column], texts: Sequence[Column]) -> list[Proposal]:
    parts = [c for c in texts if c not in labels]
    if labels[0].kind != "text" or not parts:
        return []
    fields = {"prompt": _join(parts), "completion": labels[0].name}
    return [Proposal(COMPLETION, fields, None, "completion")]


def _embeddings(texts: Sequence[Column], labels: Sequence[Column]) -> list[Proposal]:
    """Return two texts as close ones, or as more or less similar where there is a number."""
    scores = [column for column in labels if column.kind == "fraction"]
    if len(texts) != 2 or (labels and not scores):
        return []
    first, second = (column.name for column in sorted(texts, key=_order_in_pair))
    fields = {"anchor": first, "positive": second}
    if scores:
        return [Proposal(SIMILAR, fields | {"score": scores[0].name}, "embed", "score")]
    return [Proposal(CLOSE, fields, "embed", "positive")]


def _unsure(texts: Sequence[Column], close: Sequence[Proposal]) -> list[Proposal]:
    """Return two texts of which either can be the answer, or which are close."""
    if len(texts) != 2:
        return []
    questions = [c for c in texts if c.role == PROMPT]
    orders = [texts, texts[::-1]]
    if len(questions) == 1:
        orders = [order for order in orders if order[0] is questions[0]]
    both = [
        Proposal(COMPLETION, {"prompt": a.name, "completion": b.name}, None, "completion")
        for a, b in orders
    ]
    is_pair = split_name(texts[0].name)[:-1] == split_name(texts[1].name)[:-1] != ()
    return [both[0], *close, *both[1:]] if is_pair else [*both, *close]


def _plain(texts: Sequence[Column]) -> list[Proposal]:
    return [Proposal(PLAIN, {"text": _join(texts)}, "pretrain", "")] if texts else []


def _with_unread(proposal: Proposal, columns: Sequence[Column]) -> Proposal:
    """Leave out the columns whose names have a meaning and which this reading does not use."""
    used = {name for c in proposal.columns.values() for name in _columns_of(c)}
    left = {
        c.name: None
        for c in columns
        if c.name not in used and any(refused_meaning(c.name, value) for value in c.values)
    }
    return Proposal(proposal.kind, proposal.columns, proposal.objective, proposal.answer, left)


def _columns_of(column: str) -> tuple[str, ...]:
    return ColumnTemplate(column).columns if "{" in column else (column,)


def ask_for_reading(path: Path, mapping: ColumnMapping, what: str) -> DataError:
    """Return the error of a table that can be read in several ways, with these as its hint."""
    proposals = propose(mapping.records, mapping.given)
    why = f"columns found: {list_columns(mapping.names)}"
    if not proposals:
        kinds = ", ".join(f"{c.name} ({c.kind})" for c in describe_columns(mapping.records))
        hint = "name the columns: --columns '{prompt: COLUMN, completion: COLUMN}'"
        return DataError(what, where=str(path), why=f"columns found: {kinds or 'none'}", hint=hint)
    record = next((r for r in mapping.records if _is_complete(r, proposals)), mapping.records[0])
    lines = [f"{p.kind}: {p.command(path)}\n          {p.example(record)}" for p in proposals]
    return DataError(what, where=str(path), why=why, hint="\n        or ".join(lines))


def _is_complete(record: Mapping[str, Any], proposals: Sequence[Proposal]) -> bool:
    used = (n for p in proposals for c in p.columns.values() for n in _columns_of(c))
    return not any(is_blank(record.get(name)) for name in used)
