"""Labeled rows: a text or an image with its class, from a table or from a folder per class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, RawRecord, list_columns
from afina.data.schemas.base import Schema, register_schema
from afina.errors import DataError

PICTURES, TEXTS = "pictures", "text"  # the formats of labeled rows
# a file with one of these is for a language model, whatever its other columns are
LANGUAGE_COLUMNS = {"messages", "conversations", "prompt", "completion", "instruction", "output"}


@dataclass(frozen=True)
class LabeledRow:
    """What is to be classified, a text or the bytes of an image file, and its class."""

    where: str
    content: str | bytes
    label: str

    def record(self) -> dict[str, Any]:
        """Return the row for a file; an image by the place of its file."""
        content = {"text": self.content} if isinstance(self.content, str) else {"file": self.where}
        return content | {"label": self.label}


def class_names(rows: Sequence[LabeledRow]) -> tuple[str, ...]:
    """Return the classes of rows, sorted; numbers by their value, before other names."""
    names = {row.label for row in rows}
    return tuple(sorted(names, key=_class_order))


def _class_order(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdigit() else (1, 0, name)


@register_schema("labeled")
class LabeledSchema(Schema[LabeledRow]):
    """Texts or images with a class."""

    name = "labeled"
    fields = ("text", "prompt", "image", "label")
    aliases = {
        "text": ("sentence",),
        "image": ("img", "picture"),
        "label": ("class", "category"),
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
        has_label = mapping.given.get("label", "label") in columns
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
            raise DataError(
                "no column of labels",
                where=str(path),
                why=f"columns found: {list_columns(mapping.names)}",
                hint="map yours: --columns '{text: sentence, label: class}'",
            )
        return ""

    def parse(self, record: RawRecord) -> LabeledRow:
        """Return the text or image of a record with its class; raises `DataError`."""
        label = record.get("label")
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
        if content_field == "image":
            content = content.get("bytes") if isinstance(content, dict) else content
            if not isinstance(content, bytes):
                raise DataError("not a picture", where=where, why="expected its bytes")
        elif not isinstance(content, str) or not content.strip():
            raise DataError("empty text", where=where)
        return LabeledRow(record.where, content, str(label))

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
