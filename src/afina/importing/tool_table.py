"""Tables of the keys of other trainers, one YAML file per tool in `tools`.

    title        name of the tool
    extends      another table whose keys the tool reads besides
    signs        lists of keys; a file that has all keys of one of them is the tool's
    names        key -> common name, see `combine`
    defaults     key -> what the tool does without it, where it matters to the result
    defaults_of  the same, by kind of trainer
    neutral      key without a twin -> values with which it changes nothing
    comments     reason -> keys without a twin that do not change what is learned

A key of no list has no twin, and changes what is learned unless it is empty or false.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).with_name("tools")
TOOLS = ("llama_factory", "axolotl", "mlx_lm", "trl", "unsloth")  # the order of detection


@dataclass(frozen=True)
class ToolTable:
    """The keys of one tool."""

    title: str
    signs: list[list[str]]
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    defaults_of: Mapping[str, Mapping[str, Any]]
    neutral: Mapping[str, list[Any]]
    comments: Mapping[str, str]  # key -> reason

    @property
    def known(self) -> set[str]:
        """Every key of the table."""
        return {*self.names, *self.neutral, *self.comments}

    def is_sign(self, keys: Mapping[str, Any]) -> bool:
        """Return whether the keys are those of a file of this tool."""
        return any(keys.keys() >= set(sign) for sign in self.signs)

    def has_no_effect(self, key: str, value: Any) -> bool:
        """Return whether a key without a twin changes nothing with this value."""
        is_empty = value is None or value is False or value in ("", [], {})
        return is_empty or value in self.neutral.get(key, ())


@cache
def tool_table(name: str) -> ToolTable:
    """Return the table of a tool."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    parent = tool_table(values["extends"]) if "extends" in values else None
    names, neutral = values["names"], values.get("neutral", {})
    comments = {key: reason for reason, keys in values.get("comments", {}).items() for key in keys}
    defaults_of = values.get("defaults_of", {})
    if parent is not None:
        names = {**parent.names, **names}
        neutral, comments = {**parent.neutral, **neutral}, {**parent.comments, **comments}
        defaults_of = {**parent.defaults_of, **defaults_of}
    comments = {key: reason for key, reason in comments.items() if key not in {*names, *neutral}}
    return ToolTable(
        values["title"], values["signs"], names, values["defaults"], defaults_of, neutral, comments
    )
