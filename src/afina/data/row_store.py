"""Rows kept as bytes: in memory while they are few, and in a temporary file beyond that.

    rows --pickle--> | row | row | row | ...        bytes, in memory or in a file
                     0     212   305   ...          where each begins

A row of tokens takes about four bytes a token, an eighth of what Python's lists take; of a file
that exceeds the memory, only what is in use is in it. A row is a new object each time it is read.
"""

import pickle
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar, overload

RowT = TypeVar("RowT")
MAX_BYTES_IN_MEMORY = 16 << 20


class Rows(Sequence[RowT]):
    """Rows that are not all in memory; a part of them is a `SelectedRows`."""

    def _row(self, index: int) -> RowT:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> RowT: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows[RowT]": ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return a row, or some of them."""
        found = range(len(self))[index]
        return self._row(found) if isinstance(found, int) else SelectedRows(self, found)

    def __iter__(self) -> Iterator[RowT]:
        return map(self._row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Return whether `other` has equal rows in the same order."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self):,} rows>"


def _equal(one: object, other: object) -> bool:
    return bool(one == other)


class StoredRows(Rows[RowT]):
    """Rows in the order in which they were added."""

    def __init__(self, rows: Iterable[RowT] = ()) -> None:
        # Never closed by hand: rows are read as long as anything refers to the store.
        self._file = SpooledTemporaryFile(MAX_BYTES_IN_MEMORY)  # noqa: SIM115
        self._ends, self._lock = array("q", [0]), threading.Lock()
        for row in rows:
            self._file.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
            self._ends.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _row(self, index: int) -> RowT:
        start, end = self._ends[index], self._ends[index + 1]
        with self._lock:
            self._file.seek(start)
            data = self._file.read(end - start)
        row: RowT = pickle.loads(data)  # written by this process, to a file without a name
        return row


class SelectedRows(Rows[RowT]):
    """Some rows of a sequence by their indices, in any order; each can occur again."""

    def __init__(self, rows: Sequence[RowT], indices: Iterable[int]) -> None:
        self._rows, self._indices = rows, array("q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def _row(self, index: int) -> RowT:
        return self._rows[self._indices[index]]
