"""Completions that satisfy a JSON schema: token masks by llguidance (extra `afina[serve]`).

Reasons for llguidance: MIT license, one wheel for all Pythons, no dependencies (xgrammar installs
tvm and triton; outlines-core compiles the full automaton of a schema before the first token), and
an error for schemas that it does not support.
"""

import json
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from afina.errors import DataError, SettingsError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

# The form of json.dumps. JSON allows unlimited white space, and some models generate it endlessly.
JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


MAX_COMPILED = 64  # schemas that are kept
MAX_SCHEMA_CHARACTERS = 200_000  # of its JSON text


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Raise `DataError` for a panic of llguidance, which is not an `Exception` in Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError("the schema cannot be followed", why=_first_line(str(error))) from error


class GrammarMatcher:
    """State of one completion in its schema; `stops` are allowed once it is complete."""

    def __init__(self, matcher: "LLMatcher", stops: Collection[int]) -> None:
        self._matcher, self._stops = matcher, sorted(stops)
        self.is_finished = False

    def allowed_tokens(self, vocabulary: int) -> Tensor:
        """Return which tokens may come next, bool `(vocab_size,)`."""
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        with _panics_are_errors():
            if not self.is_finished:
                packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
                bits = np.unpackbits(packed, bitorder="little")[:vocabulary]
                allowed[: len(bits)] = torch.from_numpy(bits.astype(bool))
                self._check()
            allowed[self._stops] = self._matcher.is_accepting()
        return allowed

    def accept_token(self, token: int) -> None:
        """Advance by a token; raise `DataError` for one that was not allowed."""
        if token in self._stops:
            self.is_finished = True
            return
        with _panics_are_errors():
            self._matcher.consume_token(token)
            self._check()
            self.is_finished = self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DataError(
                "the schema cannot be followed any further",
                why=_first_line(self._matcher.get_error()),
            )


class GrammarCompiler:
    """Compiler of JSON schemas for one tokenizer; the latest `MAX_COMPILED` are cached.

    Raises:
        SettingsError: llguidance is not installed.
        DataError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise SettingsError(
                "a JSON schema needs llguidance", hint="pip install 'afina[serve]'"
            ) from error
        try:
            self._tokens = from_tokenizer(tokenizer)  # type: ignore[arg-type]
        except ValueError as error:
            raise DataError(
                "this tokenizer cannot follow a JSON schema", why=_first_line(str(error))
            ) from error
        self._matcher = LLMatcher
        self._known: dict[str, LLMatcher] = {}
        self._lock = threading.Lock()

    def of(self, schema: Mapping[str, Any] | str, stops: Collection[int]) -> GrammarMatcher:
        """Return a matcher at the start of a JSON schema or of a Lark grammar.

        An empty schema allows any JSON object; a text is a grammar in llguidance's form of Lark.

        Raises:
            DataError: the schema is invalid or not supported.
        """
        is_lark = isinstance(schema, str)
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema or {"type": "object"})
        except (RecursionError, ValueError, TypeError) as error:
            raise DataError("this is no JSON schema", why=str(error)) from error
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise DataError(
                f"a JSON schema of {len(text):,} characters",
                why=f"at most {MAX_SCHEMA_CHARACTERS:,} are compiled",
            )
        matcher = self._known.get(text)
        if matcher is None:
            with _panics_are_errors():
                matcher = self._compile(text, is_lark)
            with self._lock:  # several threads compile
                while len(self._known) >= MAX_COMPILED:
                    del self._known[next(iter(self._known))]
                self._known[text] = matcher
        return GrammarMatcher(matcher.deep_copy(), stops)

    def _compile(self, text: str, is_lark: bool) -> "LLMatcher":
        try:
            if is_lark:
                written = self._matcher.grammar_from_lark(text)
            else:
                written = self._matcher.grammar_from_json_schema(text, overrides=JSON_FORM)
        except ValueError as error:
            raise DataError("this is no JSON schema", why=_first_line(str(error))) from error
        is_invalid, messages = self._matcher.validate_grammar_with_warnings(written, self._tokens)
        if is_invalid:
            raise DataError("this JSON schema cannot be followed", why=_first_line(messages[0]))
        return self._matcher(self._tokens, written, log_level=0)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
