"""Python functions as rewards, of either of two signatures, which is checked before training.

    def polite(prompt: str, answer: str, reference: str | None) -> float
    def polite(prompts, completions, **columns) -> list[float | None]      as in TRL

The second is recognized by a parameter `completions`, `prompts` or `completion_ids`. It is called
with keywords: these three, and each other column of the rows by its name, as lists. Prompts and
completions are texts, or lists of messages where the rows have messages. A function is the user's
own code, and is run as such.
"""

import asyncio
import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.renderer import Example
from afina.data.schemas import PromptRow
from afina.errors import DataError, SettingsError, TrainingError, did_you_mean

OF_LISTS = ("prompts", "completions", "completion_ids")
OF_TRL = ("trainer_state", "log_extra", "log_metric", "environments")  # objects of its trainer
OWN_COLUMNS = ("prompt", "completion", *OF_LISTS)  # never passed as a column


@dataclass(frozen=True)
class Scorer:
    """Scores completions; `content_hash` identifies what it computes."""

    name: str
    content_hash: str

    needs_items = False  # whether it reads more of a row than its prompt and completion

    def check(self, row: PromptRow) -> None:
        """Raise `DataError` where a row lacks what the scorer reads."""

    def score(
        self, rows: Sequence[PromptRow], examples: Sequence[Example], batch_tokens: int
    ) -> dict[str, list[float]]:
        """Return the scores under the scorer's name, and under other names parts of them.

        Args:
            rows: The rows.
            examples: Their completions, as text and as token ids.
            batch_tokens: Tokens of a forward pass.

        Raises:
            TrainingError: The scorer fails, or a score is no finite number.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FunctionScorer(Scorer):
    """A Python function."""

    call: Callable[[str, str, str | None], Any]

    def score(
        self, rows: Sequence[PromptRow], examples: Sequence[Example], batch_tokens: int
    ) -> dict[str, list[float]]:
        """Return what the function returns for each completion."""
        pairs = zip(rows, examples, strict=True)
        return {self.name: [self._one(row, example.completion or "") for row, example in pairs]}

    def _one(self, row: PromptRow, answer: str) -> float:
        about = f"prompt {row.where}, answer {answer[:80]!r}"
        try:
            found = self.call(row.text, answer, row.reference)
        except Exception as error:  # the user's code may raise anything
            why = f"{type(error).__name__}: {error}; {about}"
            hint = "it is called with a prompt, an answer, and a reference or None"
            raise TrainingError(
                "the reward function failed", where=self.name, why=why, hint=hint
            ) from error
        number = _finite(found)
        if number is None:
            why = f"it returned {str(found)[:40]!r}; {about}"
            raise TrainingError("a reward has to be a finite number", where=self.name, why=why)
        return number


@dataclass(frozen=True)
class BatchFunctionScorer(Scorer):
    """A Python function of lists.

    Attributes:
        call: The function.
        required: Columns that it cannot be called without.
        accepted: Columns that it takes; None is all.
    """

    call: Callable[..., Any]
    required: tuple[str, ...]
    accepted: tuple[str, ...] | None

    needs_items = True

    def check(self, row: PromptRow) -> None:
        """Raise `DataError` where a row lacks a column that the function requires."""
        for name in self.required:
            if name not in row.item:
                raise DataError(
                    f"the reward function needs a column {name!r}",
                    where=row.where,
                    why=f"it is a parameter of {self.name} without a default",
                    hint=did_you_mean(name, list(row.item)),
                )

    def score(
        self, rows: Sequence[PromptRow], examples: Sequence[Example], batch_tokens: int
    ) -> dict[str, list[float]]:
        """Return what the function returns for all completions; None as not a number."""
        values = self._columns(rows) | self._lists(rows, examples)
        if self.accepted is not None:
            values = {name: value for name, value in values.items() if name in self.accepted}
        try:
            found = self.call(**values)
            found = asyncio.run(found) if inspect.iscoroutine(found) else found
            scores = list(found)
        except Exception as error:  # the user's code may raise anything
            why = f"{type(error).__name__}: {error}; prompts from {rows[0].where}"
            hint = f"it is called with lists: {', '.join(values)}"
            what = "the reward function failed"
            raise TrainingError(what, where=self.name, why=why, hint=hint) from error
        if len(scores) != len(rows):
            raise TrainingError(
                f"the reward function returned {len(scores):,} rewards",
                where=self.name,
                why=f"it was called with {len(rows):,} completions",
            )
        return {self.name: [self._number(*one) for one in zip(scores, rows, strict=True)]}

    def _lists(
        self, rows: Sequence[PromptRow], examples: Sequence[Example]
    ) -> dict[str, list[Any]]:
        """Return prompts, completions and their token ids, as TRL passes them."""
        texts = [example.completion or "" for example in examples]
        return {
            "prompts": [row.prompt if isinstance(row.prompt, str) else list(row.prompt)
                        for row in rows],
            "completions": [
                text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
                for row, text in zip(rows, texts, strict=True)
            ],
            "completion_ids": [one.token_ids[one.prompt_length :] for one in examples],
        }  # fmt: skip

    def _columns(self, rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
        """Return the other columns of the rows; None where a row has no such value."""
        names = dict.fromkeys(name for row in rows for name in row.item)
        return {
            name: [row.item.get(name) for row in rows] for name in names if name not in OWN_COLUMNS
        }

    def _number(self, found: Any, row: PromptRow) -> float:
        number = math.nan if found is None else _finite(found)
        if number is None:
            why = f"it returned {str(found)[:40]!r} for prompt {row.where}"
            raise TrainingError(
                "a reward has to be a finite number or None", where=self.name, why=why
            )
        return number


def _finite(found: Any) -> float | None:
    """Return what a function returned as a finite number; None where it is none."""
    try:
        number = math.nan if isinstance(found, str) else float(found)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def load_function(spec: str) -> Scorer:
    """Return the function of FILE.py:NAME, whose file is executed.

    Raises:
        SettingsError: There is no such file or function, or its signature is neither of the two.
    """
    file, _, name = spec.rpartition(":")
    path, where = Path(file), f"reward_funcs: {spec}"
    if not path.is_file():
        hint = "FILE.py:FUNCTION, relative to the folder where afina was started"
        raise SettingsError("no such file", where=where, hint=hint)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found = importlib.util.spec_from_file_location(f"afina_reward_{digest[:12]}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        why = f"{type(error).__name__}: {error}"
        raise SettingsError("the file cannot be run", where=where, why=why) from error
    call = getattr(module, name, None)
    if not callable(call):
        functions = [
            n for n, value in vars(module).items() if callable(value) and not n.startswith("_")
        ]
        raise SettingsError(
            f"no function {name!r}",
            where=where,
            hint=did_you_mean(name, functions) if functions else None,
        )
    return _scorer(spec, digest + name, call)


def _scorer(spec: str, content_hash: str, call: Callable[..., Any]) -> Scorer:
    """Return the scorer that fits the signature of a function.

    Raises:
        SettingsError: It can be called in neither of the two ways.
    """
    where = f"reward_funcs: {spec}"
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # a function in C without a signature
        return FunctionScorer(spec, content_hash, call)
    if not parameters.keys() & set(OF_LISTS) and not _takes_only_keywords(parameters):
        try:
            inspect.signature(call).bind("", "", None)
        except TypeError as error:
            raise SettingsError(
                "the reward function has another signature",
                where=where,
                why=str(error),
                hint="def f(prompt, answer, reference), or def f(prompts, completions, **columns)",
            ) from None
        return FunctionScorer(spec, content_hash, call)
    has_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    named = [
        one for one in parameters.values() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    for one in named:
        if one.kind is one.POSITIONAL_ONLY:
            what = f"the parameter {one.name!r} cannot be given by name"
            raise SettingsError(what, where=where, hint="def f(prompts, completions, **columns)")
    needed = [one.name for one in named if one.default is one.empty and one.name not in OF_LISTS]
    for name in needed:
        if name in OF_TRL:
            raise SettingsError(
                f"the reward function needs {name}",
                where=where,
                why="it is an object of TRL's trainer",
                hint=f"{name}=None in its signature, or leave it out",
            )
    accepted = None if has_all else tuple(one.name for one in named)
    return BatchFunctionScorer(spec, content_hash, call, tuple(needed), accepted)


def _takes_only_keywords(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a signature is `**columns`, or names of columns after a star."""
    kinds = {one.kind for one in parameters.values()}
    return bool(kinds) and kinds <= {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    }
