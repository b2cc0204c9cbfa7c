"""JSON objects from files of unknown origin, and from the project's own run folders."""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import AdapterError, AfinaError
from afina.io.regular_file import open_regular_file

MAX_DIGITS = 19  # of an integer: more than 64 bits have


@dataclass(frozen=True)
class JsonLimits:
    """Limits of one kind of JSON file.

    Attributes:
        max_bytes: Largest file, in bytes.
        max_depth: Deepest nesting of objects and lists.
        is_strict: Whether repeated keys, NaN, infinity and long integers are errors.
        is_regular: Whether the file must be a regular file with one name.
    """

    max_bytes: int
    max_depth: int
    is_strict: bool = True
    is_regular: bool = False


AUDIT_JSON = JsonLimits(1 << 20, 32, is_regular=True)
# afina.json of 5,000 target modules has 0.3 MB; links are followed, since hub caches hold links
ADAPTER_JSON = JsonLimits(16 << 20, 32)
RUN_JSON = JsonLimits(256 << 20, 128, is_strict=False)  # of a run folder: NaN is a valid loss there


def read_json_object(
    file: Path, limits: JsonLimits = RUN_JSON, error: type[AfinaError] = AdapterError
) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
        AfinaError: of the class `error`, where the file is missing, larger or deeper than `limits`,
            or holds no JSON object.
    """
    try:
        raw = _read_bytes(file, limits, error)
    except OSError as cause:
        why = os.strerror(cause.errno) if cause.errno else str(cause)
        raise error("cannot be read", where=str(file), why=why) from cause
    return parse_object(raw, str(file), limits, error)


def _read_bytes(file: Path, limits: JsonLimits, error: type[AfinaError]) -> bytes:
    if limits.is_regular:
        with open_regular_file(file) as stream:
            return stream.read(limits.max_bytes + 1)
    if not stat.S_ISREG(file.stat().st_mode):  # a pipe would block
        raise error("not a regular file", where=str(file))
    with file.open("rb") as stream:
        return stream.read(limits.max_bytes + 1)


def parse_object(
    raw: bytes,
    where: str,
    limits: JsonLimits = AUDIT_JSON,
    error: type[AfinaError] = AdapterError,
) -> dict[str, Any]:
    """Return the JSON object in `raw`, under the rules of `read_json_object`."""
    if len(raw) > limits.max_bytes:
        raise error(f"larger than {limits.max_bytes:,} bytes", where=where)
    hooks: dict[str, Any] = {}
    if limits.is_strict:
        hooks = {
            "object_pairs_hook": unique_keys,
            "parse_constant": _reject_constant,
            "parse_int": bounded_int,
            "parse_float": _finite_float,
        }
    try:
        value = json.loads(raw.decode("utf-8"), **hooks)
    except RecursionError as cause:
        raise error("nested too deeply", where=where) from cause
    except ValueError as cause:
        raise error("not valid JSON", where=where, why=str(cause)[:200]) from cause
    if not isinstance(value, dict):
        raise error("not a JSON object", where=where)
    if _depth(value) > limits.max_depth:
        why = f"at most {limits.max_depth} levels are read"
        raise error("nested too deeply", where=where, why=why)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of `pairs`; raise `ValueError` where a key is repeated."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def bounded_int(text: str) -> int:
    """Return the integer in `text`; raise `ValueError` where it has more than 19 digits."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
    return int(text)


def _reject_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a finite number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _depth(value: Any) -> int:
    """Return the levels of nesting, with a stack: recursion could overflow."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, depth = todo.pop()
        deepest = max(deepest, depth)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        todo += [(child, depth + 1) for child in inner]
    return deepest
