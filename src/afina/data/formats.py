"""A data file in any usual format becomes a table of rows; the format is recognised by the content.

The name's ending only settles what would otherwise be taken for plain text: a .jsonl file that is no JSON
is an error, not a text to learn. What every format demands is in rows.py, how bytes are read in readers.py.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data import readers
from afina.data.rows import FIELDS, PARSERS, REQUIRED, Message, RawRecord, SFTRow, recognise
from afina.data.skipped import parse_rows, summarize_skipped
from afina.errors import DataError, did_you_mean

__all__ = ["Message", "SFTRow", "Table", "read_table"]


@dataclass(frozen=True)
class Table:
    """The rows of one file, its format, the rows left out ("file:line:field: what"), and the file's sha256."""

    path: Path
    format: str
    rows: list[SFTRow]
    skipped: list[str]
    digest: str


def read_table(
    path: Path, columns: Mapping[str, str] | None = None, skip_bad_rows: bool = False
) -> Table:
    """Read a file of data.

    `columns` gives our field names the file's own, e.g. {"prompt": "question", "completion": "answer"}.
    With `skip_bad_rows` a row that cannot be used is left out and listed.
    Raises `DataError` with file:line:field.
    """
    path = Path(path)
    known: dict[str, str] = dict(columns or {})
    check_columns(path, known, FIELDS)
    data = file_bytes(path)
    records = list(_records(path, data, lambda names: _is_header(names, known)))
    if not records:
        raise DataError("the file has no rows", where=str(path))
    names = list(
        dict.fromkeys(name for _, record in records if isinstance(record, dict) for name in record)
    )
    broken = next((record for _, record in records if isinstance(record, DataError)), None)
    if broken and not (names and skip_bad_rows):
        raise broken
    columns = _all_columns(path, names, known)
    format = _format(path, set(_renamed(dict.fromkeys(names), columns)), names, known)
    skipped: list[str] = []
    parse = PARSERS[format]
    rows = parse_rows(
        records,
        lambda where, r: parse(RawRecord(where, _renamed(r, columns), columns)),
        skipped if skip_bad_rows else None,
    )
    if not rows:
        raise DataError(
            "no row can be used", where=str(path), why=f"skipped: {summarize_skipped(skipped)}"
        )
    if format == "openai-chat" and _says_from(records, columns["messages"]):
        format = "sharegpt"
    return Table(path, format, rows, skipped, hashlib.sha256(data).hexdigest())


def check_columns(path: Path, columns: Mapping[str, str], fields: Sequence[str]) -> None:
    """Raise `DataError` where --columns gives a name to a field that there is not."""
    for name in columns:
        if name not in fields:
            why = f"it says what our names are in your file; ours are {', '.join(fields)}"
            raise DataError(
                f"unknown field {name!r} in --columns",
                where=str(path),
                why=why,
                hint=did_you_mean(name, fields),
            )


def file_bytes(path: Path) -> bytes:
    """What is in a data file; raises `DataError` where there is nothing to read."""
    if path.is_dir():
        hint = "name one file in it, or --objective classify for pictures in folders"
        raise DataError("this is a folder", where=str(path), hint=hint)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        there = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            "no such file", where=str(path), hint=did_you_mean(path.name, there) if there else None
        ) from None
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    if not data.strip():
        raise DataError("the file is empty", where=str(path))
    return data


def read_records(
    path: Path, is_header: Callable[[list[str]], bool]
) -> tuple[list[tuple[str, dict[str, Any] | DataError]], str]:
    """(records with their places, sha256 of the file), whatever their fields mean; `is_header` knows a CSV's first line."""
    data = file_bytes(path)
    return list(_records(path, data, is_header)), hashlib.sha256(data).hexdigest()


def first_record(path: Path, is_header: Callable[[list[str]], bool]) -> dict[str, Any]:
    """The first record of a file that is one, as `read_records` would find it; empty where there is none."""
    return next(
        (r for _, r in _records(path, file_bytes(path), is_header) if isinstance(r, dict)), {}
    )


def first_names(path: Path, is_header: Callable[[list[str]], bool]) -> set[str]:
    """The names in the first record of a file."""
    return {str(name) for name in first_record(path, is_header)}


def _records(path: Path, data: bytes, is_header: Callable[[list[str]], bool]) -> readers.Records:
    """The records of the file, by the reader that its content asks for."""
    if data[:4] == b"PAR1":
        return readers.read_parquet(path, data)
    if path.suffix.lower() == ".parquet":
        raise DataError("not a Parquet file", where=str(path), why="it does not begin with PAR1")
    text = readers.decode(path, data)
    if readers.looks_like_json(path, text):
        return readers.read_json(path, text)
    mark = readers.delimiter(path, text, is_header)
    return readers.read_text(path, text) if mark is None else readers.read_csv(path, text, mark)


def _is_header(names: list[str], columns: Mapping[str, str]) -> bool:
    """Whether the first line of a text names the columns of a known format, or all those the user named."""
    if columns and set(columns.values()) <= set(names):
        return True
    return recognise(set(names) | ({"messages"} if "conversations" in names else set())) is not None


def _all_columns(path: Path, names: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The user's names, with `messages` called what this file calls it; raises on a column that is not there."""
    for ours, theirs in columns.items():
        if theirs not in names:
            found = ", ".join(name[:40] for name in names[:20])
            why, hint = (
                f"--columns calls it {ours}; columns found: {found}",
                did_you_mean(theirs, names) if names else None,
            )
            raise DataError(f"no column {theirs!r}", where=str(path), why=why, hint=hint)
    chat = "messages" if "messages" in names or "conversations" not in names else "conversations"
    return {"messages": chat, **columns}


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record by our names; a column that was renamed no longer counts under its own."""
    taken = set(columns.values())
    kept = {
        name: value for name, value in record.items() if name not in taken and name not in columns
    }
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}


def _format(path: Path, names: Set[str], found: list[str], told: Mapping[str, str]) -> str:
    """The format of records with these fields; raises `DataError` with the columns found and what to type.

    What the user has `told` of the columns is kept in that where it leads to a format.
    """
    format = recognise(names)
    if format is not None:
        return format
    spare = [name for name in found if name not in FIELDS and name.lower() != "id"]
    for name, required in REQUIRED:
        if (
            required & names and not spare
        ):  # nothing else could be meant: its rows will say what they miss
            return name
    guess = {"prompt": "question", "completion": "answer"}
    free = [name for name in spare if name not in told.values()]
    lacking = [
        required - names for _, required in REQUIRED if required & names and set(told) <= required
    ]
    fillable = [sorted(fields) for fields in lacking if len(fields) <= len(free)]
    if fillable:
        guess = dict(told) | dict(zip(fillable[0], free, strict=False))
    elif len(spare) > 1:
        guess = {"prompt": spare[0], "completion": spare[1]}
    example = ", ".join(f"{ours}: {theirs[:40]}" for ours, theirs in guess.items())
    raise DataError(
        "these columns belong to no format that is known",
        where=str(path),
        why=f"columns found: {', '.join(name[:40] for name in found[:20]) or 'none'}",
        hint=f"say what yours mean: --columns '{{{example}}}'",
    )


def _says_from(records: list[tuple[str, Any]], column: str) -> bool:
    """Whether the chats are spelled from/value (ShareGPT) instead of role/content."""
    turns = next((r[column] for _, r in records if isinstance(r, dict) and r.get(column)), None)
    if isinstance(turns, str):
        return '"from"' in turns
    return (
        isinstance(turns, list) and isinstance(turns[0], dict) and turns[0].get("from") is not None
    )
