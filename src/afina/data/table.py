"""Tables: the rows of one file or folder under one schema, whatever format the file has.

bytes --readers--> records --columns--> fields --schema--> rows
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from afina.data.column_kinds import SAMPLE
from afina.data.columns import ColumnMapping, Columns, RawRecord
from afina.data.hub import is_hub_dataset, read_hub_dataset
from afina.data.image_folder import has_metadata
from afina.data.input_file import WINDOWS_1252, InputFile
from afina.data.proposals import ask_for_reading, propose
from afina.data.readers import Record, read_records
from afina.data.row_store import StoredRows
from afina.data.schemas import (
    EMBEDDING,
    LABELED,
    PICTURES,
    PREFERENCE,
    PROMPT,
    RELEVANCE,
    ROW_SCHEMAS,
    SFT,
    TAGGED,
    Schema,
)
from afina.data.unread import UnreadColumns
from afina.errors import DataError, pluralize

TEXT_FORMAT = "text"
MAX_LINES_SHOWN = 3  # lines named for each reason why rows were skipped
RowT = TypeVar("RowT")
InputT = TypeVar("InputT")


@dataclass(frozen=True)
class FileRows:
    """What was read of one of several files.

    Attributes:
        path: The file.
        format: Its format.
        num_rows: Number of its rows.
        weight: Its part of the training rows; None where each row counts once.
    """

    path: str
    format: str
    num_rows: int
    weight: float | None


@dataclass(frozen=True)
class Table(Generic[RowT]):
    """The rows of one file.

    Attributes:
        path: The file or folder.
        format: Its format under the schema, such as "openai-chat" or "pairs".
        rows: Rows in the order of the file.
        skipped: Rows left out, each as "file:line:field: what".
        digest: sha256 of the file.
        unused_columns: Columns that were not read, with the number of rows that have a value there.
        rule: How the rows were read, where their shape can be read in several ways.
        files: The files that were joined to this table, where there are several.
    """

    path: Path
    format: str
    rows: Sequence[RowT]
    skipped: list[str]
    digest: str
    unused_columns: dict[str, int] = field(default_factory=dict)
    rule: str = ""
    files: tuple[FileRows, ...] = ()


class DetectedSchema(NamedTuple):
    """The schema that recognizes a file, and the file's format under it."""

    schema: Schema[Any]
    format: str


def read_table(
    path: Path,
    schema: Schema[RowT],
    columns: Columns | None = None,
    skip_bad_rows: bool = False,
) -> Table[RowT]:
    """Return the rows of a file or folder.

    Args:
        path: JSON, JSONL, CSV, TSV, Parquet or plain text, or a folder of images per class.
        schema: The kind of rows that it holds.
        columns: The file's own column names, {field: column}; a column can be a template over
            several, and {column: None} leaves one out.
        skip_bad_rows: Leave out and list rows that cannot be used; without it they are an error.

    Returns:
        The table, with at least one row.

    Raises:
        DataError: nothing can be read, a column is unknown, or a row cannot be used; names
            file:line:field, the field as the file calls it.

    Example:
        >>> table = read_table(Path("qa.csv"), SFT, {"prompt": "question", "completion": "answer"})
    """
    path = Path(path)
    if path.is_dir() and columns and not has_metadata(path):
        hint = "leave --columns out"
        raise DataError("a folder of pictures has no columns", where=str(path), hint=hint)
    mapping = ColumnMapping.create(path, schema.fields, schema.aliases, columns or {})
    source = _open_source(path, schema, mapping)
    first_look = _FirstLook.at(source)
    if first_look.broken is not None and not (first_look.objects and skip_bad_rows):
        raise first_look.broken
    mapping = mapping.of_file(list(first_look.names), first_look.objects)
    if not path.is_dir():
        mapping.check_given(path)
    found = schema.find_format(path, mapping)
    unread, rules = UnreadColumns(schema), dict.fromkeys(filter(None, [source.note]))
    first: list[RawRecord] = []

    def parse(where: str, values: dict[str, Any]) -> RowT:
        record = RawRecord(where, values, mapping, found)
        row = schema.parse(record)
        first.extend([record] if len(first) < SAMPLE else [])
        rules.update(dict.fromkeys(filter(None, [schema.reading_rule(record)])))
        unread.add(record)
        return row

    skipped: list[str] = []
    rows = parse_rows(source.records(), parse, skipped if skip_bad_rows else None)
    if not rows:
        why = f"skipped: {summarize_skipped(skipped)}"
        raise DataError("no row can be used", where=str(path), why=why)
    found = schema.format_of_rows(path, found, first, rows)
    unused = unread.check(path, found)
    return Table(path, found, rows, skipped, source.digest, unused, "; ".join(rules))


def detect_schema(path: Path, columns: Columns) -> DetectedSchema | None:
    """Return the first schema that recognizes a file's first record; None where none does.

    A file that cannot be read is not recognized: reading all of it gives the better error.

    Raises:
        DataError: the file has a column `text` and others that give it a role; the hint
            has the ways to read it.
    """
    if path.is_dir():
        return DetectedSchema(LABELED, PICTURES)
    for schema in _detection_order():
        try:
            found = schema.recognizes(_first_records(path, schema, columns, 1))
        except DataError:
            continue
        if found is not None:
            return DetectedSchema(schema, found)
    if not columns:
        _check_text_alone(path)
    return None


def _check_text_alone(path: Path) -> None:
    """Raise `DataError` where a table of texts has columns that may be labels or answers."""
    try:
        records = _first_records(path, SFT, {}, SAMPLE)
    except DataError:
        return
    if SFT.recognizes(records[:1]) != TEXT_FORMAT:
        return
    raw = [record.raw for record in records]
    readings = propose(raw)
    names = list(dict.fromkeys(name for record in raw for name in record))
    is_plain = len(readings) == 1 and readings[0].columns == {"text": "text"}
    if readings and not (is_plain and not readings[0].unread):
        what = "this table can be read in more than one way"
        raise ask_for_reading(path, records[0].mapping.of_file(names, raw), what)


def _detection_order() -> list[Schema[Any]]:
    """Return the schemas that can be detected: afina's own before those of other packages.

    Labels come before preferences, as a table of texts with labels can have any other columns.
    SFT rows are what remains, and prompts are read only where the objective is given.
    """
    own = (TAGGED, LABELED, PREFERENCE, EMBEDDING, RELEVANCE, SFT, PROMPT)
    names = {schema.name for schema in own}
    others = [schema() for name, schema in ROW_SCHEMAS.items() if name not in names]
    return [TAGGED, LABELED, PREFERENCE, EMBEDDING, RELEVANCE, *others]


def _first_records(
    path: Path, schema: Schema[Any], columns: Columns, limit: int
) -> list[RawRecord]:
    known = {name: c for name, c in columns.items() if c is None or name in schema.fields}
    mapping = ColumnMapping.create(path, schema.fields, schema.aliases, known)
    source = _open_source(path, schema, mapping)
    objects = ((where, r) for where, r in source.records() if isinstance(r, dict))
    return [
        RawRecord(where, record, mapping.of_file(list(record)))
        for where, record in islice(objects, limit)
    ]


@dataclass(frozen=True)
class _Source:
    """A file or folder whose records are read anew by each pass over them.

    Attributes:
        records: Returns them.
        digest: Its sha256.
        note: Its encoding, where it was found by the letters and could be another.
    """

    records: Callable[[], Iterator[Record]]
    digest: str
    note: str = ""


@dataclass
class _FirstLook:
    """What has to be known of all records before the first one is parsed."""

    names: dict[str, None]  # columns, in order of appearance
    objects: list[dict[str, Any]]  # the first SAMPLE records
    broken: DataError | None  # the first record that cannot be read

    @classmethod
    def at(cls, source: _Source) -> "_FirstLook":
        found = cls({}, [], None)
        for _, record in source.records():
            if isinstance(record, DataError):
                found.broken = found.broken or record
                continue
            found.names.update(dict.fromkeys(record))
            found.objects.extend([record] if len(found.objects) < SAMPLE else [])
        return found


def _open_source(path: Path, schema: Schema[Any], mapping: ColumnMapping) -> _Source:
    """Return a file or folder; raises `DataError` where nothing can be read."""
    if path.is_dir() or is_hub_dataset(path):
        rows, digest = schema.read_folder(path) if path.is_dir() else read_hub_dataset(path)
        return _Source(lambda: iter(rows), digest)
    file = InputFile.open(path)
    usual = ColumnMapping.create(path, schema.fields, schema.aliases, {})

    def is_header(names: list[str]) -> bool:
        own = mapping.of_file(names)
        given = {column for name in own.given for column in own.candidates[name]}
        has_all_given = bool(given) and given <= set(names)
        return has_all_given or schema.is_header(own.fields_in(names) | usual.fields_in(names))

    def is_row(names: list[str]) -> bool:
        return bool(mapping.of_file(names).fields_in(names) | usual.fields_in(names))

    def records() -> Iterator[Record]:
        return read_records(file, is_header, is_row, schema.text_is_lines)

    if next(records(), None) is None:
        raise DataError("the file has no rows", where=str(path))
    note = "text decoded as Windows-1252" if file.encoding == WINDOWS_1252 else ""
    return _Source(records, file.digest, note)


def parse_rows(
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[str, Any], RowT],
    skipped: list[str] | None,
) -> StoredRows[RowT]:
    """Return what `iter_parsed` yields."""
    return StoredRows(iter_parsed(rows, parse, skipped))


def iter_parsed(
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[str, Any], RowT],
    skipped: list[str] | None,
) -> Iterator[RowT]:
    """Yield `parse(where, row)` of each row.

    Args:
        rows: Pairs of location and row; a row can be the `DataError` that reading it raised.
        parse: Returns the parsed row; raises `DataError` for one that cannot be used.
        skipped: Where rows that cannot be used are listed as "file:line:field: what". With None the
            first of them is an error.
    """
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            parsed = parse(where, row)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(f"{error.where or where}: {error.what}")
        else:
            yield parsed


def summarize_skipped(skipped: Sequence[str]) -> str:
    """Return skipped rows by reason, such as "2 rows (lines 3, 8): the field is empty".

    Each of `skipped` is "file:line:field: what"; reasons that differ only in numbers are one.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for line in skipped:
        where, _, what = line.partition(": ")
        groups.setdefault(re.sub(r"\d[\d,]*", "0", what), []).append((where, what))
    return "; ".join(_summarize_group(lines) for lines in groups.values())


def _summarize_group(lines: Sequence[tuple[str, str]]) -> str:
    numbers = ", ".join(_line_of(where) for where, _ in lines[:MAX_LINES_SHOWN])
    num_hidden = len(lines) - MAX_LINES_SHOWN
    rest = f" and {num_hidden:,} more" if num_hidden > 0 else ""
    plural = "s" * (len(lines) > 1)
    first = ":" if len({what for _, what in lines}) == 1 else ", the first:"
    return f"{pluralize(len(lines), 'row')} (line{plural} {numbers}{rest}){first} {lines[0][1]}"


def _line_of(where: str) -> str:
    """Return the line number of file:line:field, or all of it where it has none."""
    found = re.search(r":(?:row )?(\d+)(?::|$)", where)
    return found[1] if found else where
