"""The error tree: each error has what happened, where, why, and what to type next.

AfinaError
 ├── SettingsError     a setting that is unknown, or of the wrong kind
 ├── DataError         a file or a row that cannot be used
 ├── BaseError         a base model that cannot be loaded
 ├── AdapterError      an adapter that does not fit, or a file of one that is damaged
 ├── TrainingError     a run that cannot start, continue or be resumed
 ├── MergeError        a merged model that would not equal the adapted one
 ├── BusyError         the queue of the engine is full
 └── AuditError        an adapter that may not be used, or without proof of origin
"""

import difflib
import re
from collections.abc import Iterable
from typing import Self


class AfinaError(Exception):
    """Any error that the user can resolve."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Create an error.

        Args:
            what: The subject and what is wrong with it.
            where: `file:line:field`, or the flag.
            why: The evidence.
            hint: A command or value to type next.
        """
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(str(self))

    def at(self, where: str | None) -> Self:
        """Return this error with `where` in front of its own: "file: field"."""
        if where is None or where == self.where:
            return self
        self.where = where if self.where is None else f"{where}: {self.where}"
        self.args = (str(self),)
        return self

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        parts += [f"  why:  {self.why}"] if self.why else []
        parts += [f"  next: {self.hint}"] if self.hint else []
        return "\n".join(parts)


class SettingsError(AfinaError):
    """A setting that is unknown, of the wrong kind, or at odds with another."""


class DataError(AfinaError):
    """A data file or a row of one that cannot be used."""


class BaseError(AfinaError):
    """A base model that is missing, damaged, closed or of a kind that cannot be used."""


class AdapterError(AfinaError):
    """An adapter that does not fit its base, or whose files are damaged."""


class TrainingError(AfinaError):
    """A run that cannot start, continue or be resumed."""


class MergeError(AfinaError):
    """A merged model whose answers would differ from the adapted one's."""


class BusyError(AfinaError):
    """The engine's queue is full, or the engine is stopping; retry after `retry_after` seconds."""

    def __init__(self, what: str, retry_after: float = 1.0) -> None:
        super().__init__(what, hint=f"try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class AuditError(AfinaError):
    """An adapter that may not be used, or whose origin cannot be proved."""


def pluralize(number: int, thing: str) -> str:
    """Return a number with its noun: 1 row, 2 rows, 1,000 queries."""
    if number != 1:
        thing = re.sub(r"(?<=[^aeiou])y$", "ie", thing) + "s"
    return f"{number:,} {thing}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name closest to `name`, or with all where none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
