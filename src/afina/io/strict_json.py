"""JSON of a stranger, without surprises."""

import json
from pathlib import Path
from typing import Any

from afina.errors import AuditError
from afina.io.atomic import open_regular_file

MAX_JSON, MAX_DEPTH = 1 << 20, 32


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB and 32 levels, every key once, all numbers finite; raises `AuditError`."""
    with open_regular_file(file) as stream:
        raw = stream.read(MAX_JSON + 1)
    return parse_object(raw, str(file))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`, by the rules of `read_object`."""
    if len(raw) > MAX_JSON:
        raise AuditError("larger than 1 MiB", where=where)
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_never, parse_int=_int
        )
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
