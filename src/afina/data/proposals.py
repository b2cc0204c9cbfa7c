"""Readings of a table whose columns no schema knows: up to three, each with an example to compare.

A reading follows from what the names of columns mean and from their values: few different values
are classes; numbers, lists and identifiers are neither prompt nor answer. The order of columns
decides only the order in which texts are joined.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.data.column_kinds import SAMPLE, Column, describe_columns, num_words
from afina.data.columns import (
    ColumnMapping,
    ColumnTemplate,
    columns_flag,
    is_blank,
    list_columns,
    value_at,
)
from afina.data.names import (
    ANSWER,
    CHOICES,
    CHOSEN,
    CONTEXT,
    LABEL,
    PROMPT,
    REJECTED,
    SCORE,
    SYSTEM,
    TEXT,
    UNKNOWN,
    refused_meaning,
    split_name,
)
from afina.errors import DataError

MAX_PROPOSALS = 3
MAX_EXAMPLE = 100  # characters of a value in an example
MIN_FILLED = 0.2  # ratio of rows in which a column must have a value to be proposed as a text
_HEADS = {"title", "titulo", "subject", "asunto", "headline"}  # what stands above a text
_FIRST, _SECOND = {"premise", "premisa"}, {"hypothesis", "hipotesis", "pair"}


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
SEVERAL = "several classes a row"
COMPLETION, PLAIN, RATED = "prompt and completion", "plain text", "good and bad answers"
CLOSE, SIMILAR = "texts that belong together", "similarity of two texts"


def _value(column: Any, record: Mapping[str, Any]) -> str:
    if isinstance(column, str) and "{" not in column:
        value = value_at(record, column)
        return str(value[0] if isinstance(value, list) and len(value) == 1 else value)
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
    if any(c.role == ANSWER and c.kind in ("list", "object", "mixed") for c in columns):
        return []  # answers that are no texts: any reading without them would be another task
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
    found = [*_flags(columns, texts), *found]
    plain = [p for p in plain if not _with_unread(p, columns).unread]  # of texts it would lose some
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
    if column.role == ANSWER:
        return True
    if column.role in (PROMPT, CONTEXT, TEXT):
        return not (column.has_few_values and column.num_distinct < 2)
    is_source = split_name(column.name) in (("source",), ("original",))
    return column.is_prose and (column.role == UNKNOWN or is_source)


def _rank(column: Column) -> int:
    """Where a text stands among those that are put together."""
    if set(split_name(column.name)) & _HEADS:
        return 0
    return {CONTEXT: 1, TEXT: 2, PROMPT: 4, ANSWER: 5, CHOICES: 6}.get(column.role, 3)


def _order_in_pair(column: Column) -> tuple[int, int, str]:
    """Where a text stands in a pair: what is questions or given first, then by number or letter."""
    words = split_name(column.name)
    is_second = bool(set(words) & _SECOND) or column.role in (CONTEXT, ANSWER)
    is_first = column.role == PROMPT or bool(set(words) & _FIRST)
    last = words[-1] if words else ""  # a name in another script has no words here
    number = last if last.isdigit() or len(last) == 1 else ""
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
        parts += [c for c in columns if c.role == CHOICES and c not in parts and parts]
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


def _flags(columns: Sequence[Column], texts: Sequence[Column]) -> list[Proposal]:
    """Return several columns of 0 and 1 as the classes of a text."""
    names = [
        c.name for c in columns if c.role in (LABEL, UNKNOWN, REJECTED, CHOSEN) and _is_flags(c)
    ]
    if len(names) < 2 or not texts:
        return []
    fields = {"text": _join([c for c in texts if c.name not in names]), "label": names}
    return [Proposal(SEVERAL, fields, "classify", "label")]


def _is_flags(column: Column) -> bool:
    return {str(value).lower() for value in column.values} <= {"0", "1", "true", "false"}


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


def _columns_of(column: Any) -> tuple[str, ...]:
    if not isinstance(column, str):
        return tuple(column)
    return ColumnTemplate(column).columns if "{" in column else (column,)


def ask_for_reading(path: Path, mapping: ColumnMapping, what: str) -> DataError:
    """Return the error of a table that can be read in several ways, with these as its hint."""
    proposals = propose(mapping.records, mapping.given)
    why = f"columns found: {list_columns(mapping.names)}"
    if not proposals:
        columns = describe_columns(mapping.records)
        kinds = ", ".join(f"{c.name} ({c.kind})" for c in columns)
        hint = _hint_without_reading(mapping.names, columns)
        return DataError(what, where=str(path), why=f"columns found: {kinds or 'none'}", hint=hint)
    record = next((r for r in mapping.records if _is_complete(r, proposals)), mapping.records[0])
    lines = [f"{p.kind}: {p.command(path)}\n          {p.example(record)}" for p in proposals]
    return DataError(what, where=str(path), why=why, hint="\n        or ".join(lines))


def _hint_without_reading(names: Sequence[str], columns: Sequence[Column]) -> str:
    """Return what to do with a table of which no reading is known."""
    if any(num_words(name) > 3 or name.isdigit() for name in names):
        return "the first line is a row: put a line with the names of the columns before it"
    turns = [c.name for c in columns if c.kind == "list" and isinstance(c.values[0][0], dict)]
    if turns:
        return f"the turns in {turns[0]} need the keys role and content, or from and value"
    answers = [c for c in columns if c.role == ANSWER and c.kind in ("list", "object", "mixed")]
    if answers:
        return f"{answers[0].name} has to be a text: one row for each answer"
    return "name the columns: --columns '{prompt: COLUMN, completion: COLUMN}'"


def _is_complete(record: Mapping[str, Any], proposals: Sequence[Proposal]) -> bool:
    used = (n for p in proposals for c in p.columns.values() for n in _columns_of(c))
    return not any(is_blank(value_at(record, name)) for name in used)
