"""Rows that cannot be used: an error, or left out and told in words: why, and where the first of them are."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from afina.errors import DataError, pluralize

SHOWN = 3  # places named for each reason
Made = TypeVar("Made")


def parse_rows(
    rows: Iterable[tuple[str, Any]], make: Callable[[str, Any], Made], skipped: list[str] | None
) -> list[Made]:
    """What `make(where, row)` gives of each (where, row); a row may be the `DataError` that reading it gave.

    One that cannot be used is an error, or is listed in `skipped` ("file:line:field: what") when that is given.
    """
    made: list[Made] = []
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            made.append(make(where, row))
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(f"{error.where or where}: {error.what}")
    return made


def summarize_skipped(skipped: Sequence[str]) -> str:
    """ "file:line:field: what" lines by their reason, numbers in it aside: "2 rows (lines 3, 8): the field is empty"."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for line in skipped:
        where, _, what = line.partition(": ")
        groups.setdefault(re.sub(r"\d[\d,]*", "0", what), []).append((where, what))
    return "; ".join(_one(lines) for lines in groups.values())


def _one(lines: Sequence[tuple[str, str]]) -> str:
    places = [
        found[1] if (found := re.search(r":(?:row )?(\d+)(?::|$)", where)) else where
        for where, _ in lines[:SHOWN]
    ]
    rest = f" and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
    first = ":" if len({what for _, what in lines}) == 1 else ", the first:"
    return f"{pluralize(len(lines), 'row')} (line{'s' * (len(lines) > 1)} {', '.join(places)}{rest}){first} {lines[0][1]}"
