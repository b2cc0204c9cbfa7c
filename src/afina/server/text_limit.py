"""Bound of a prompt's characters, checked before it is rendered and tokenized.

A text with more characters than `context` times those of the longest token cannot fit the context,
and tokenizing 8 MB takes a minute.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from afina.data.renderer import Renderer
from afina.server.errors import APIError


class TextLimit:
    """Largest number of characters of one prompt."""

    def __init__(self, renderer: Renderer, context: int) -> None:
        """Compute the bound of a context of `context` tokens."""
        self.context = context
        self.longest_token = max(map(len, renderer.tokenizer.get_vocab()), default=1)
        self.characters = context * self.longest_token

    def check(self, value: Any, param: str) -> None:
        """Raise `APIError` 400 for a text, or a body's part with texts, that cannot fit."""
        found = count_characters(value, self.characters)
        if found > self.characters:
            what = (
                f"{param} has more than {self.characters:,} characters, which cannot fit the "
                f"context of the base ({self.context:,} tokens)"
            )
            raise APIError(400, what, param, "context_length_exceeded")


def count_characters(value: Any, enough: int) -> int:
    """Return the characters of all texts in a value; it stops counting beyond `enough`."""
    total, todo = 0, [value]
    while todo and total <= enough:
        one = todo.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, BaseModel):
            todo += [getattr(one, name) for name in type(one).model_fields]
        elif isinstance(one, Mapping):
            todo += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            todo += one
    return total
