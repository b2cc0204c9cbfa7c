"""Files of a stranger, opened without following anything; JSON without surprises."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from afina.errors import AuditError

MAX_JSON, MAX_DEPTH = 1 << 20, 32
PATTERN = re.compile(r"\^?(\.\*|\\d\+|[\w\-]|\\?\.)+\$?")  # names, dots, .* and \d+: no groups, so nothing to nest


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A regular file with one name, opened without following a link; raises `AuditError` where it is something else.

    The checks are of what was opened, not of its name; that it did not change while it was read is checked at the end.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if file.is_symlink():  # where the system has no O_NOFOLLOW
            raise AuditError("a link, not a file", where=str(file), hint="copy the file itself (cp -L)")
        number = os.open(file, flags)
    except OSError as error:
        raise AuditError("cannot be opened as a plain file", where=str(file), why=os.strerror(error.errno or 0)) from error
    with os.fdopen(number, "rb") as stream:
        before = os.fstat(number)
        if not stat.S_ISREG(before.st_mode):
            raise AuditError("not a regular file", where=str(file))
        if before.st_nlink > 1:
            raise AuditError("a file with several names (hard links)", where=str(file), hint="copy it")
        yield stream
        if state(os.fstat(number)) != state(before):
            raise AuditError("it changed while it was read", where=str(file))


def state(about: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB and 32 levels, every key once, all numbers finite; raises `AuditError`."""
    with opened(file) as stream:
        raw = stream.read(MAX_JSON + 1)
    return parse_object(raw, str(file))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`, by the rules of `read_object`."""
    if len(raw) > MAX_JSON:
        raise AuditError("larger than 1 MiB", where=where)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_never, parse_int=_int)
    except RecursionError as error:
        raise AuditError("nested too deeply", where=where) from error
    except ValueError as error:
        raise AuditError("no strict JSON", where=where, why=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise AuditError("not a JSON object", where=where)
    if _depth(value) > MAX_DEPTH:
        raise AuditError("nested too deeply", where=where)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _never(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _int(text: str) -> int:
    if len(text) > 19:
        raise ValueError("a number of more than 19 digits")
    return int(text)


def _depth(value: Any) -> int:
    """Levels of nesting; by a stack, since the value is a stranger's."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, depth = todo.pop()
        deepest = max(deepest, depth)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        todo += [(child, depth + 1) for child in inner]
    return deepest


def is_plain_pattern(text: Any) -> bool:
    """Whether a pattern is of a form that cannot make the matching explode."""
    return isinstance(text, str) and len(text) <= 256 and text.count(".*") <= 3 and PATTERN.fullmatch(text) is not None
