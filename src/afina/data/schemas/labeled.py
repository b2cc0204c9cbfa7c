"""Labeled rows: a text, a pair of texts or an image with what is to be predicted of it.

The type of the labels is the task: a text, an integer or a boolean is a class, a list is a set
of classes (multi-label), and a fraction is a number to predict (regression).
"""

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, RawRecord, kind_of, list_columns, usable_text
from afina.data.proposals import ask_for_reading
from afina.data.schemas.base import Schema, register_schema
from afina.errors import DataError

PICTURES, TEXTS = "pictures", "text"  # the formats of labeled rows
# a file with one of these is for a language model, whatever its other columns are
LANGUAGE_COLUMNS = {"messages", "conversations", "prompt", "completion", "instruction", "output"}


CLASSES, MULTI_LABEL, REGRESSION = "classes", "multi-label", "regression"  # tasks
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
Label = str | tuple[str, ...] | float


@dataclass(frozen=True)
class LabeledRow:
    """What is to be classified and its label.

    Attributes:
        where: Location of the row.
        content: A text, or the bytes of an image file.
        label: A class, several classes, or a number.
        pair: The second text of a pair.
    """

    where: str
    content: str | bytes
    label: Label
    pair: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the row for a file; an image by the path of its file."""
        content = {"text": self.content} if isinstance(self.content, str) else {"file": self.where}
        content |= {} if self.pair is None else {"text_pair": self.pair}
        label = list(self.label) if isinstance(self.label, tuple) else self.label
        return content | {"label": label}


def task_of(rows: Sequence[LabeledRow]) -> str:
    """Return the task that the labels of rows are of; raises `DataError` where they are mixed."""
    several = [isinstance(row.label, tuple) for row in rows]
    if any(several):
        _check_all(rows, several, MULTI_LABEL, "a list of classes")
        return MULTI_LABEL
    numbers = [
        isinstance(row.label, float) or bool(_NUMBER.fullmatch(str(row.label))) for row in rows
    ]
    if any(isinstance(row.label, float) for row in rows):
        _check_all(rows, numbers, REGRESSION, "a number")
        return REGRESSION
    # cells of a CSV file are texts: numbers of which some have fractions are no names of classes
    has_fractions = all(numbers) and any(float(str(row.label)) % 1 for row in rows)
    return REGRESSION if has_fractions else CLASSES


def _check_all(rows: Sequence[LabeledRow], fits: Sequence[bool], task: str, kind: str) -> None:
    if not all(fits):
        odd, first = rows[fits.index(False)], rows[fits.index(True)]
        raise DataError(
            f"a label of another type: {odd.label!r}",
            where=f"{odd.where}:label",
            why=f"the label of {first.where} is {kind} ({task}), and all rows have one task",
            hint="make all labels of one type, or leave rows out with --skip-bad-rows",
        )


def class_names(rows: Sequence[LabeledRow]) -> tuple[str, ...]:
    """Return the classes of rows, sorted; numbers by their value, before other names."""
    names: set[str] = set()
    for row in rows:
        names.update(row.label if isinstance(row.label, tuple) else [str(row.label)])
    return tuple(sorted(names, key=_class_order))


def _class_order(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdigit() else (1, 0, name)


@register_schema("labeled")
class LabeledSchema(Schema[LabeledRow]):
    """Texts, pairs of texts or images with a label."""

    name = "labeled"
    fields = ("text", "text_pair", "prompt", "image", "label")
    aliases = {
        "text": ("sentence", "sentence1", "sentence_1", "text1", "text_a", "question1", "premise"),
        "text_pair": ("sentence2", "sentence_2", "text2", "text_b", "question2", "hypothesis"),
        "image": ("img", "picture"),
        "label": ("labels", "class", "category"),
    }
    reads_folders = True

    def is_header(self, fields: set[str]) -> bool:
        """Return whether a CSV header names the class."""
        return "label" in fields

    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return the format of a record with a `label`, a text or an image, and no answer."""
        if not records:
            return None
        first = records[0]
        mapping, columns = first.mapping, set(first.raw)
        given = mapping.given.get("label", "label")
        has_label = bool({"labels", *([given] if isinstance(given, str) else given)} & columns)
        fields = mapping.fields_in(columns)
        if not has_label or columns & LANGUAGE_COLUMNS or not {"text", "image"} & fields:
            return None
        return PICTURES if "image" in fields else TEXTS

    def objective(self, format: str) -> str:
        """Return "classify"."""
        return "classify"

    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return "", since the rows decide; raises `DataError` without a column of classes."""
        if "label" not in mapping.fields_in(mapping.names):
            raise ask_for_reading(path, mapping, "no column of labels")
        return ""

    def parse(self, record: RawRecord) -> LabeledRow:
        """Return the text or image of a record with its class; raises `DataError`."""
        label, given = record.get("label"), record.mapping.given.get("label")
        content_field = next(
            (f for f in ("image", "text", "prompt") if _is_filled(record, f)), None
        )
        if label in (None, "") or content_field is None:
            missing = "label" if label in (None, "") else "text or image"
            columns = list_columns(map(str, record.raw))
            example = "{text: sentence, label: class}"
            hint = f"its columns are {columns}; map yours: --columns '{example}'"
            raise DataError(f"no {missing}", where=record.where, hint=hint)
        content, where = record.get(content_field), record.field_location(content_field)
        pair = None
        if content_field == "image":
            content = content.get("bytes") if isinstance(content, dict) else content
            if not isinstance(content, bytes):
                raise DataError("not a picture", where=where, why="expected its bytes")
        else:
            _check_text(content, label, where)
            if _is_filled(record, "text_pair"):
                pair = record.text("text_pair")
        if given is not None and not isinstance(given, str):
            value: Label = _label_of_columns(record, given)
        else:
            value = parse_label(label, record.field_location("label"))
        return LabeledRow(record.where, content, value, pair)

    def format_of_rows(
        self, path: Path, format: str, records: Sequence[RawRecord], rows: Sequence[LabeledRow]
    ) -> str:
        """Return "pictures" or "text"; raises `DataError` where rows are of both kinds."""
        kinds = {PICTURES if isinstance(row.content, bytes) else TEXTS for row in rows}
        if len(kinds) > 1:
            what = "some rows have a picture and some a text"
            raise DataError(what, where=str(path), hint="one file for each")
        return kinds.pop()


def _is_filled(record: RawRecord, name: str) -> bool:
    return record.peek(name) not in (None, "")


def _check_text(content: Any, label: Any, where: str) -> None:
    if isinstance(content, list) and isinstance(label, list) and len(content) == len(label):
        raise DataError(
            "a list of words with a label each is token classification",
            where=where,
            hint="--objective tag; or one text with one label, or with a list of labels",
        )
    if isinstance(content, str) and not content.strip():
        raise DataError("empty text", where=where)
    usable_text(content, where)


def parse_label(value: Any, where: str) -> Label:
    """Return a label: a class, several classes, or a number.

    Raises:
        DataError: the type of the value is that of another task; names it.
    """
    if isinstance(value, str) and value[:1] + value[-1:] == "[]":  # a list in a CSV cell
        value = _parse_list(value)
    if isinstance(value, list):
        if all(isinstance(item, (str, int)) for item in value):
            return tuple(str(item) for item in value)
        kinds = {isinstance(item, float) for item in value}
        task = "several numbers to predict" if kinds == {True} else f"a list of {kind_of(value[0])}"
        hint = "a list of names of classes, or one number"
        raise DataError(f"{task}: not supported as a label", where=where, hint=hint)
    if isinstance(value, dict) and value and all(_is_flag(flag) for flag in value.values()):
        return tuple(name for name, flag in value.items() if _is_set(flag))
    if isinstance(value, dict):
        what = "an object as a label: shares of classes (soft labels) are not supported"
        raise DataError(what, where=where, hint="the likeliest class as the label")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"a label of {value} is no number to predict", where=where)
        return value
    if isinstance(value, (str, int)):
        return str(value)
    raise DataError(
        f"expected a class, a list of classes or a number, found {kind_of(value)}", where=where
    )


_FLAGS = {"0": False, "1": True, "false": False, "true": True}


def _is_flag(value: Any) -> bool:
    """Return whether a value marks a class as present or absent: 0 or 1, true or false."""
    return not isinstance(value, (list, dict)) and str(value).strip().lower() in _FLAGS


def _is_set(value: Any) -> bool:
    return _FLAGS[str(value).strip().lower()]


def _label_of_columns(record: RawRecord, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns with a 1, the classes of a row; raises `DataError` for other values."""
    found = []
    for column in columns:
        value = record.value_of(column)
        if not _is_flag(value):
            hint = "several columns as the label are the classes that a row has (1) or not (0)"
            what = f"expected 0 or 1, found {value!r}"
            raise DataError(what, where=f"{record.where}:{column}", hint=hint)
        found += [column] if _is_set(value) else []
    return tuple(found)


def _parse_list(text: str) -> Any:
    """Return the list that a cell holds, as JSON or as Python writes it; else the text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
    return text
