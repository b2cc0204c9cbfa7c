"""Columns of a table: what their names mean, and of what kind their values are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.data.columns import is_blank
from afina.data.names import (
    ANSWER,
    CHOSEN,
    LABEL,
    NONE,
    PROMPT,
    REJECTED,
    SYSTEM,
    TEXT,
    meaning_of,
)

SAMPLE = 1000  # records whose values are looked at
_INTEGER, _FLOAT = (
    re.compile(r"[+-]?\d+"),
    re.compile(r"[+-]?(\d+[.,]\d*|[.,]\d+)(e[+-]?\d+)?%?", re.I),
)
_IDENTIFIER = re.compile(
    r"[0-9a-f]{8,}|[0-9a-f]{8}-[0-9a-f-]{20,}|\w+://\S+|www\.\S+|[\w.+-]+@[\w-]+\.\w+"
    r"|(/[\w.-]+){2,}|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T][\d:.]+(Z|[+-][\d:]+)?)?|[\d:]+:\d+"
    r"|#?[A-Za-z]{0,8}[-_#:]?\d+([-_]\d+)*",
    re.I,
)
# Chinese, Japanese, Thai, Lao, Khmer
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1780-\u17ff]")
_BOOLEAN = {"true", "false", "yes", "no", "si", "sí"}
_FIELD_ROLES = {
    "prompt": PROMPT,
    "instruction": PROMPT,
    "completion": ANSWER,
    "output": ANSWER,
    "system": SYSTEM,
    "text": TEXT,
    "text_pair": TEXT,
    "label": LABEL,
    "chosen": CHOSEN,
    "rejected": REJECTED,
}


@dataclass(frozen=True)
class Column:
    """A column of a table: what its name means, and of what kind its values are."""

    name: str
    role: str
    kind: str  # text, number, fraction, boolean, identifier, list, object, bytes or mixed
    values: list[Any]

    @property
    def num_words(self) -> float:
        """Mean number of words of its values."""
        return sum(num_words(str(v)) for v in self.values) / max(1, len(self.values))

    @property
    def num_distinct(self) -> int:
        """Number of different values."""
        return len({repr(value) for value in self.values})

    @property
    def is_prose(self) -> bool:
        """Whether it holds texts of some words that mostly differ."""
        return self.kind == "text" and self.num_words >= 3 and not self.has_few_values

    @property
    def has_few_values(self) -> bool:
        """Whether its values repeat as those of a class do; unknown of fewer than six rows."""
        return len(self.values) >= 6 and self.num_distinct <= min(100, len(self.values) / 2)

    @property
    def can_be_label(self) -> bool:
        """Whether its values can be classes, or sets of them."""
        if len(self.values) > 2 and self.num_distinct < 2:
            return False  # the same in all rows
        few = self.has_few_values or len(self.values) < 6
        if self.kind == "list":
            return all(isinstance(item, str) for value in self.values for item in value)
        if self.kind == "number":
            return few
        return self.kind == "boolean" or (self.kind == "text" and (few or self.num_words < 3))


def num_words(text: str) -> float:
    """Return the words of a text; scripts without spaces have about two characters a word."""
    return max(len(text.split()), len(_NO_SPACES.findall(text)) / 2)


def _flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the values inside objects under dotted names, as `--columns` has them.

    Turns, and objects whose names mean nothing to a model, stay as they are.
    """
    found: dict[str, Any] = {}
    for name, value in record.items():
        is_turn = isinstance(value, dict) and bool({"role", "from", "content"} & value.keys())
        if isinstance(value, dict) and value and not is_turn and meaning_of(str(name)) != NONE:
            found |= {f"{name}.{inner}": own for inner, own in _flatten(value).items()}
        else:
            found[str(name)] = value
    return found


def describe_columns(
    records: Sequence[Mapping[str, Any]], given: Mapping[str, Any] | None = None
) -> list[Column]:
    """Return the columns of records in order of appearance; `given` is that of `--columns`."""
    values: dict[str, list[Any]] = {}
    for record in records[:SAMPLE]:
        for name, value in _flatten(record).items():
            kept = values.setdefault(name, [])
            kept += [] if is_blank(value) else [value]
    roles: dict[str, str | None] = {
        column: _FIELD_ROLES.get(field)
        for field, column in (given or {}).items()
        if isinstance(column, str)
    }
    lower = {name.lower() for name in values}
    if {"q", "a"} <= lower:
        roles = {**dict.fromkeys((n for n in values if n.lower() == "a"), ANSWER), **roles}
    return [
        Column(name, roles.get(name) or meaning_of(name), _kind_of_values(own), own)
        for name, own in values.items()
    ]


def _kind_of_values(values: Sequence[Any]) -> str:
    if all(isinstance(v, list) and len(v) == 1 and isinstance(v[0], str) for v in values):
        values = [value[0] for value in values]  # each is one text
    kinds = [_kind_of_value(value) for value in values]
    if not kinds:
        return "empty"
    found = set(kinds)
    if found <= {"number", "fraction"}:
        return "fraction" if "fraction" in found else "number"
    if found <= {"text", "boolean"} and "text" in found:
        return "text"
    main = max(found, key=kinds.count)
    return main if kinds.count(main) >= 0.9 * len(kinds) else "mixed"


def _kind_of_value(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "number"), (float, "fraction"), (list, "list")):
        if isinstance(value, kind):
            return name
    if not isinstance(value, str):
        return "bytes" if isinstance(value, bytes) else "object"
    text = value.strip()
    if text.lower() in _BOOLEAN:
        return "boolean"
    patterns = ((_INTEGER, "number"), (_FLOAT, "fraction"), (_IDENTIFIER, "identifier"))
    return next((name for pattern, name in patterns if pattern.fullmatch(text)), "text")
