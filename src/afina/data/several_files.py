"""Tables of several files as one, and the training rows by the files' weights.

With weights, an epoch has every row at least once, and rows of files below their ratio again, so
that each file has its ratio of the rows. Which rows are repeated is a pure function of the seed.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from afina.data.row_store import SelectedRows, StoredRows
from afina.data.table import FileRows, Table
from afina.errors import DataError, pluralize

MAX_REPEATS = 100  # of a row in an epoch; more is a weight that was not meant

RowT = TypeVar("RowT")


class HasLocation(Protocol):
    """A row with its location."""

    @property
    def where(self) -> str:
        """The location, `file:line`."""


LocatedT = TypeVar("LocatedT", bound=HasLocation)


def join_tables(tables: Sequence[Table[RowT]], weights: Sequence[float | None]) -> Table[RowT]:
    """Return the rows of several files, one file after the other; one table as it is."""
    if len(tables) == 1:
        return tables[0]
    files = tuple(
        FileRows(str(table.path), table.format, len(table.rows), weight)
        for table, weight in zip(tables, weights, strict=True)
    )
    unused: Counter[str] = Counter()
    for table in tables:
        unused.update(table.unused_columns)
    parts = [[table.digest, weight] for table, weight in zip(tables, weights, strict=True)]
    return replace(
        tables[0],
        format=", ".join(dict.fromkeys(table.format for table in tables)),
        rows=StoredRows(row for table in tables for row in table.rows),
        skipped=[line for table in tables for line in table.skipped],
        digest=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        unused_columns=dict(unused),
        rule="; ".join(dict.fromkeys(table.rule for table in tables if table.rule)),
        files=files,
    )


def check_one_kind(table: Table[Any], kind: Callable[[str], str] = str) -> None:
    """Raise `DataError` where several files have rows of different kinds.

    Args:
        table: The table.
        kind: Returns the kind of rows of a format; the format itself by default.
    """
    kinds = {kind(file.format): file for file in reversed(table.files)}
    if len(kinds) > 1:
        (one, first), (other, second) = list(reversed(kinds.items()))[:2]
        raise DataError(
            f"files of different kinds: {one} and {other}",
            where=second.path,
            why=f"{first.path} has {one}, and {second.path} has {other}",
            hint="files of one kind, or a run for each",
        )


def file_number(files: Sequence[FileRows]) -> Callable[[HasLocation], int]:
    """Return a function from a row to the number of its file."""
    by_length = sorted(range(len(files)), key=lambda n: -len(files[n].path))

    def find(row: HasLocation) -> int:
        return next((n for n in by_length if _is_in(row.where, files[n].path)), 0)

    return find


def _is_in(where: str, path: str) -> bool:
    return where.startswith(path) and where[len(path) : len(path) + 1] in (":", "/", "\\")


def mix_rows(rows: Sequence[LocatedT], files: Sequence[FileRows], seed: int) -> Sequence[LocatedT]:
    """Return the training rows of an epoch; without weights they are the rows.

    Args:
        rows: Training rows of all files.
        files: The files; none where there is one only.
        seed: Seed of which rows are repeated once more than others.

    Raises:
        DataError: a file has no training row, or its rows would be repeated too often.
    """
    if not any(file.weight for file in files):
        return rows
    number = file_number(files)
    parts: list[list[int]] = [[] for _ in files]
    for index, row in enumerate(rows):
        parts[number(row)].append(index)
    total = sum(file.weight or 0.0 for file in files)
    ratios = [(file.weight or 0.0) / total for file in files]
    for file, part in zip(files, parts, strict=True):
        if not part:
            raise DataError("no training row is left of this file", where=file.path)
    num_rows = max(len(part) / ratio for part, ratio in zip(parts, ratios, strict=True))
    mixed: list[int] = []
    for n, (file, part, ratio) in enumerate(zip(files, parts, ratios, strict=True)):
        wanted = max(len(part), round(ratio * num_rows))
        if wanted > MAX_REPEATS * len(part):
            raise DataError(
                f"its {pluralize(len(part), 'row')} would be repeated "
                f"{wanted / len(part):,.0f} times in an epoch",
                where=file.path,
                why=f"its weight is {100 * ratio:.4g}% of all, and rows of files with more rows "
                f"are used once; at most {MAX_REPEATS} times",
                hint="a smaller weight for it, or fewer rows in the other files",
            )
        once_more = random.Random(f"{seed} {n}").sample(range(len(part)), wanted % len(part))
        mixed += part * (wanted // len(part)) + [part[index] for index in sorted(once_more)]
    return SelectedRows(rows, mixed)


def describe_files(
    rows: Sequence[LocatedT], files: Sequence[FileRows], length: Callable[[Any], int]
) -> list[dict[str, Any]]:
    """Return what each of several files is of an epoch: its rows, and its ratio of rows and tokens.

    Args:
        rows: The training rows of an epoch.
        files: The files.
        length: Returns the tokens of a row; 0 where it has none.
    """
    number = file_number(files)
    counts, tokens = Counter[int](), Counter[int]()
    for row in rows:
        counts[number(row)] += 1
        tokens[number(row)] += length(row)
    num_rows, num_tokens = len(rows), sum(tokens.values())
    return [
        {
            "path": file.path,
            "format": file.format,
            "rows": file.num_rows,
            "weight": file.weight,
            "epoch_rows": counts[n],
            "rows_percent": 100.0 * counts[n] / num_rows,
            "tokens_percent": 100.0 * tokens[n] / num_tokens if num_tokens else None,
        }
        for n, file in enumerate(files)
    ]


def summarize_file(file: dict[str, Any]) -> str:
    """Return a line about one of several files, from `describe_files`."""
    tokens = file["tokens_percent"]
    of_tokens = "" if tokens is None else f", {tokens:.1f}% of the tokens"
    return (
        f"{file['path']}: {pluralize(file['rows'], 'row')}; {pluralize(file['epoch_rows'], 'row')} "
        f"of an epoch, {file['rows_percent']:.1f}%{of_tokens}"
    )
