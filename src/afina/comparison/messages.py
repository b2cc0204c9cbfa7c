"""Sentences of a comparison's report, from messages.yaml, in English and Spanish."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Words = Callable[..., str]


@cache
def load_messages() -> dict[str, dict[str, str]]:
    """Return messages.yaml: sentences by key and language ("en", "es")."""
    file = Path(__file__).with_name("messages.yaml")
    content: dict[str, dict[str, str]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def words(lang: str) -> Words:
    """Return a function of a key and values that writes a sentence in a language."""

    def write(key: str, **values: Any) -> str:
        return load_messages()[key][lang].format(**values)

    return write
