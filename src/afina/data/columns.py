"""Columns of a file: which of them holds each field of a schema, and what a row reads from them.

fields of the schema     prompt          completion
--columns                question
columns of the file      question        completion        id
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from afina.errors import DataError, did_you_mean

MAX_COLUMNS_SHOWN = 20
MAX_NAME_LENGTH = 40  # characters of a column name in an error message
_ABSENT = object()


def list_columns(names: Iterable[str]) -> str:
    """Return column names for an error message, shortened; "none" where there are none."""
    shown = [name[:MAX_NAME_LENGTH] for name in list(names)[:MAX_COLUMNS_SHOWN]]
    return ", ".join(shown) or "none"


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's type for an error message."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def usable_text(value: Any, where: str, may_be_empty: bool = False) -> str:
    """Return `value` if it is a text that a tokenizer accepts.

    Raises:
        DataError: the value is missing, no text, empty, or not valid Unicode.
    """
    if value is None:
        raise DataError("the field is missing", where=where)
    if not isinstance(value, str):
        raise DataError(f"expected text, found {kind_of(value)}", where=where)
    if not may_be_empty and not value.strip():
        raise DataError("the field is empty", where=where)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON allows half of a surrogate pair, no tokenizer does
        raise DataError("not valid Unicode", where=where, why=str(error)) from None
    return value


def is_blank(value: Any) -> bool:
    """Return whether a column holds no value: null, or the empty text of a CSV cell."""
    return value is None or (isinstance(value, str) and value == "")


def _value_at(record: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column; a dotted name that is no column reads inside an object."""
    if column in record:
        return record[column]
    head, dot, rest = column.partition(".")
    inner = record.get(head)
    return _value_at(inner, rest) if dot and isinstance(inner, dict) else _ABSENT


@dataclass(frozen=True)
class ColumnMapping:
    """The columns in which each field is looked for, in order of preference.

    Attributes:
        candidates: Column names of each field. A field named in `--columns` has one candidate; the
            others have their own name and its aliases, without the columns given to other fields.
        given: What `--columns` gives: {field: column}.
        names: Columns of the file, in order.
    """

    candidates: Mapping[str, tuple[str, ...]]
    given: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @classmethod
    def create(
        cls,
        path: Path,
        fields: Sequence[str],
        aliases: Mapping[str, Sequence[str]],
        given: Mapping[str, str],
    ) -> "ColumnMapping":
        """Return the mapping of a schema's fields under `--columns`.

        Raises:
            DataError: `given` names a field that the schema does not have.
        """
        for name in given:
            if name not in fields:
                raise DataError(
                    f"unknown field {name!r} in --columns",
                    where=str(path),
                    why="it maps a field to a column of the file; fields are " + ", ".join(fields),
                    hint=did_you_mean(name, fields),
                )
        taken = set(given.values())
        candidates = {}
        for name in fields:
            usual = (name, *aliases.get(name, ()))
            free = tuple(column for column in usual if column not in taken)
            candidates[name] = (given[name],) if name in given else free
        return cls(candidates, dict(given))

    def of_file(self, names: Sequence[str]) -> "ColumnMapping":
        """Return this mapping for a file with the columns `names`."""
        return replace(self, names=tuple(names))

    def check_given(self, path: Path) -> None:
        """Raise `DataError` where `--columns` names a column that the file does not have."""
        for name, column in self.given.items():
            if column not in self.names:
                raise DataError(
                    f"no column {column!r}",
                    where=str(path),
                    why=f"--columns calls it {name}; columns found: {list_columns(self.names)}",
                    hint=did_you_mean(column, self.names) if self.names else None,
                )

    def fields_in(self, names: Iterable[str]) -> set[str]:
        """Return the fields for which one of these columns is a candidate."""
        there = set(names)
        return {name for name, columns in self.candidates.items() if there & set(columns)}

    def column_of(self, name: str, record: Mapping[str, Any]) -> str:
        """Return the column that holds a field of `record`: the first candidate with a value.

        Without a value, the first candidate that the record or the file has; else the first one.
        """
        candidates = self.candidates[name]
        present = [c for c in candidates if _value_at(record, c) is not _ABSENT]
        filled = [column for column in present if not is_blank(_value_at(record, column))]
        in_file = [column for column in candidates if column in self.names]
        return next(iter((*filled, *present, *in_file, *candidates)), name)


@dataclass(frozen=True)
class RawRecord:
    """One record of a file, read by the names of a schema's fields.

    Attributes:
        where: "file:line", or "file:row n" where records do not have a line each.
        raw: The record as the file has it.
        mapping: Where each field is found.
        format: Format of the file, as the schema recognized it.
        columns_read: Columns that were read so far.
    """

    where: str
    raw: Mapping[str, Any]
    mapping: ColumnMapping
    format: str = ""
    columns_read: set[str] = field(default_factory=set, compare=False)

    def has(self, name: str) -> bool:
        """Return whether a field has a value other than null, without counting it as read."""
        return self.peek(name) is not None

    def has_column(self, name: str) -> bool:
        """Return whether the record has a column for a field, whatever its value."""
        column = self.mapping.column_of(name, self.raw)
        return _value_at(self.raw, column) is not _ABSENT

    def peek(self, name: str) -> Any:
        """Return the value of a field without counting it as read."""
        return self._value(self.mapping.column_of(name, self.raw))

    def get(self, name: str) -> Any:
        """Return the value of a field and count its column as read; None where it has no value."""
        column = self.mapping.column_of(name, self.raw)
        self.columns_read.add(column if column in self.raw else column.partition(".")[0])
        return self._value(column)

    def text(self, name: str) -> str:
        """Return the text of a field that must not be empty; raises `DataError`."""
        return usable_text(self.get(name), self.field_location(name))

    def optional(self, name: str) -> str:
        """Return the text of a field that may be missing; raises `DataError` for another type."""
        value = self.get(name)
        if value is None:
            return ""
        return usable_text(value, self.field_location(name), may_be_empty=True)

    def field_location(self, name: str) -> str:
        """Return file:line:field, the field as the file calls it."""
        return f"{self.where}:{self.mapping.column_of(name, self.raw)}"

    def unused_columns(self) -> list[str]:
        """Return the columns with a value that were not read."""
        return [
            str(name)
            for name, value in self.raw.items()
            if name not in self.columns_read and not is_blank(value)
        ]

    def _value(self, column: str) -> Any:
        value = _value_at(self.raw, column)
        return None if value is _ABSENT else value
