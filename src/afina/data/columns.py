"""Columns of a file: which of them holds each field of a schema, and what a row reads from them.

fields of the schema     prompt                       completion
--columns                {context}\n\n{question}                    id: null
columns of the file      context   question           completion   id
"""

import json
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def finite_number(value: Any, where: str) -> float:
    """Return a number, also one that a CSV cell holds as text; raises `DataError`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"expected a number, found {value!r}", where=where)
    return number


def is_blank(value: Any) -> bool:
    """Return whether a column holds no value: null, an empty list, the empty text of a CSV cell."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _value_at(record: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column; a dotted name that is no column reads inside an object."""
    if column in record:
        return record[column]
    head, dot, rest = column.partition(".")
    inner = record.get(head)
    return _value_at(inner, rest) if dot and isinstance(inner, dict) else _ABSENT


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, dotted inside an object; None where there is none."""
    value = _value_at(record, column)
    return None if value is _ABSENT else value


Columns = Mapping[str, str | Sequence[str] | None]  # what `--columns` gives


@dataclass(frozen=True)
class ColumnTemplate:
    """A field composed of several columns or of a fixed text, as `--columns` gives it.

    "{context}\\n\\n{question}" is a text with columns in it; [context, question] are columns with a
    blank line between them, without the empty ones.
    """

    given: str | Sequence[str]

    @property
    def name(self) -> str:
        """What stands for it in an error message: the template, or its columns."""
        return self.given if isinstance(self.given, str) else " + ".join(self.given)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        if not isinstance(self.given, str):
            return tuple(self.given)
        return tuple(name for _, name in self._pieces() if name is not None)

    def _pieces(self) -> Iterator[tuple[str, str | None]]:
        assert isinstance(self.given, str)
        for text, name, spec, conversion in string.Formatter().parse(self.given):
            if name == "" or spec or conversion:
                raise ValueError("a column in braces is its name: {question}; a brace is {{ or }}")
            yield text, name

    def render(self, record: Mapping[str, Any]) -> str | None:
        """Return the text for a record; None where it lacks a column, or has a value in none."""
        values = [_value_at(record, column) for column in self.columns]
        if any(value is _ABSENT for value in values) or (values and all(map(is_blank, values))):
            return None
        texts = ["" if value is None else _as_text(value) for value in values]
        if not isinstance(self.given, str):
            return "\n\n".join(text for text in texts if text)
        rest = iter(texts)
        return "".join(text + ("" if name is None else next(rest)) for text, name in self._pieces())


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_template(field_name: str, given: str | Sequence[str], names: Sequence[str]) -> bool:
    """Return whether a value of `--columns` is a template rather than the name of a column."""
    if not isinstance(given, str):
        return True
    if given in names:
        return False
    return "{" in given or (field_name == "system" and " " in given.strip())


@dataclass(frozen=True)
class ColumnMapping:
    """The columns in which each field is looked for, in order of preference.

    Attributes:
        candidates: Column names of each field. A field named in `--columns` has one candidate; the
            others have their own name and its aliases, without the columns given to other fields.
        given: What `--columns` gives: {field: column}.
        names: Columns of the file, in order.
        left_out: Columns that `--columns` leaves out: {column: null}.
        templates: Fields that are composed of several columns or are a fixed text.
        records: The file's records, whose values distinguish its columns.
    """

    candidates: Mapping[str, tuple[str, ...]]
    given: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()
    templates: Mapping[str, ColumnTemplate] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def create(
        cls,
        path: Path,
        fields: Sequence[str],
        aliases: Mapping[str, Sequence[str]],
        columns: Columns,
    ) -> "ColumnMapping":
        """Return the mapping of a schema's fields under `--columns`.

        Raises:
            DataError: `columns` names a field that the schema does not have.
        """
        left_out = frozenset(name for name, column in columns.items() if column is None)
        given = {name: column for name, column in columns.items() if column is not None}
        for name in given:
            if name not in fields:
                raise DataError(
                    f"unknown field {name!r} in --columns",
                    where=str(path),
                    why="it maps a field to a column of the file; fields are " + ", ".join(fields),
                    hint=did_you_mean(name, fields),
                )
        taken = {column for column in given.values() if isinstance(column, str)} | left_out
        candidates = {}
        for name in fields:
            own = given.get(name)
            usual = (name, *aliases.get(name, ()))
            free = tuple(column for column in usual if column not in taken)
            candidates[name] = free if own is None else (own,) if isinstance(own, str) else ()
        return cls(candidates, given, left_out=left_out)

    def of_file(
        self, names: Sequence[str], records: Sequence[Mapping[str, Any]] = ()
    ) -> "ColumnMapping":
        """Return this mapping for a file with the columns `names` and these records."""
        templates = {
            name: ColumnTemplate(value)
            for name, value in self.given.items()
            if _is_template(name, value, names)
        }
        try:
            own = {name: template.columns for name, template in templates.items()}
        except ValueError as error:
            what = "broken template of columns"
            raise DataError(what, where="columns", why=str(error)) from None
        taken = {column for columns in own.values() for column in columns}
        free = {
            name: columns if name in self.given else tuple(c for c in columns if c not in taken)
            for name, columns in self.candidates.items()
        }
        return replace(
            self, names=tuple(names), templates=templates, candidates=free | own, records=records
        )

    def check_given(self, path: Path) -> None:
        """Raise `DataError` where `--columns` names a column that the file does not have."""
        wanted = [(name, c) for name in self.given for c in self.candidates[name]]
        wanted += [("null", column) for column in sorted(self.left_out)]
        for name, column in wanted:
            if not self._is_column(column):
                raise DataError(
                    f"no column {column!r}",
                    where=str(path),
                    why=f"--columns calls it {name}; columns found: {list_columns(self.names)}",
                    hint=did_you_mean(column, self.names) if self.names else None,
                )

    def _is_column(self, column: str) -> bool:
        head, dot, _ = column.partition(".")
        return column in self.names or bool(dot and head in self.names)

    def fields_in(self, names: Iterable[str]) -> set[str]:
        """Return the fields for which one of these columns is a candidate."""
        there = set(names)
        inner = {name for name in self.given if self._is_column_in(name, there)}
        return inner | {name for name, columns in self.candidates.items() if there & set(columns)}

    def _is_column_in(self, name: str, there: set[str]) -> bool:
        """Whether a field of `--columns` is a fixed text, or inside an object."""
        template = self.templates.get(name)
        if template is not None and not template.columns:
            return True
        heads = {str(column).partition(".")[0] for column in self.candidates.get(name, ())}
        return bool(heads & there)

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
        columns_read: Columns that were read so far, dotted inside objects.
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
        if name in self.mapping.templates:
            return True
        return _value_at(self.raw, self._column_of(name)) is not _ABSENT

    def peek(self, name: str) -> Any:
        """Return the value of a field without counting it as read."""
        template = self.mapping.templates.get(name)
        if template is not None:
            return template.render(self.raw)
        return self.value_of(self._column_of(name))

    def get(self, name: str) -> Any:
        """Return the value of a field and count its column as read; None where it has no value."""
        template = self.mapping.templates.get(name)
        self.columns_read.update(template.columns if template else [self._column_of(name)])
        return self.peek(name)

    def text(self, name: str) -> str:
        """Return the text of a field that must not be empty, or the only text of a list.

        Raises:
            DataError: there is no such text.
        """
        value = self.get(name)
        is_single = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
        return usable_text(value[0] if is_single else value, self.field_location(name))

    def optional(self, name: str) -> str:
        """Return the text of a field that may be missing; raises `DataError` for another type."""
        value = self.get(name)
        if value is None:
            return ""
        return usable_text(value, self.field_location(name), may_be_empty=True)

    def field_location(self, name: str) -> str:
        """Return file:line:field, the field as the file calls it."""
        template = self.mapping.templates.get(name)
        return f"{self.where}:{template.name if template else self._column_of(name)}"

    def value_of(self, column: str) -> Any:
        """Return the value of a column of the file, a dotted one inside an object; or None."""
        return value_at(self.raw, column)

    def unread(self) -> dict[str, Any]:
        """Return the columns with a value that were not read; "input.tools" is one in an object."""
        left = {name: v for name, v in self.raw.items() if name not in self.mapping.left_out}
        return dict(_unread_in(left, self.columns_read, ""))

    def _column_of(self, name: str) -> str:
        return self.mapping.column_of(name, self.raw)


def _unread_in(
    values: Mapping[str, Any], columns_read: set[str], prefix: str
) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = f"{prefix}{name}"
        if path in columns_read or is_blank(value):
            continue
        if isinstance(value, dict) and any(c.startswith(f"{path}.") for c in columns_read):
            yield from _unread_in(value, columns_read, f"{path}.")
        else:
            yield path, value


def columns_flag(columns: Mapping[str, Any]) -> str:
    """Return `--columns '{...}'` for a mapping of fields to columns, templates or null."""
    return "--columns '{" + ", ".join(f"{_key(k)}: {_value(v)}" for k, v in columns.items()) + "}'"


def _key(name: str) -> str:
    return name if _is_plain(name) else json.dumps(name, ensure_ascii=False)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if not isinstance(value, str):
        return "[" + ", ".join(map(_key, value)) + "]"
    return _key(value)


def _is_plain(text: str) -> bool:
    """Whether YAML reads a text without quotes as itself."""
    words = text.replace("_", "").replace("-", "").replace(".", "").replace(" ", "")
    is_word = words.isalnum() and not words.isdigit() and text == text.strip()
    return is_word and text.lower() not in _YAML_WORDS


_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "none", "~"}
