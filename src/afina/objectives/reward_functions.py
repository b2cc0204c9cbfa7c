"""Reward functions of completions: Python functions, reward models and graders, with weights.

    rules.py:polite   def polite(prompt: str, answer: str, reference: str | None) -> float
    runs/judge        a run of --objective reward on the same base, which is in memory only once
    grader.json       a grader as OpenAI's API describes it (see `graders`)

The reward of a completion is the sum of weight times score. A function is the user's own code, and
is run as such.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.loading import load_adapter
from afina.data.packing import batches_by_length, pack_examples
from afina.data.renderer import Example
from afina.data.schemas import PromptRow
from afina.errors import SettingsError, TrainingError, did_you_mean
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.io.chat_format import ChatFormat
from afina.io.run_record import read_run_record
from afina.models.causal_lm import CausalLM
from afina.objectives.graders import Grader, read_grader
from afina.objectives.reward_model import score_sequences
from afina.settings import PolicySettings

CODE_SUFFIX, GRADER_SUFFIX = ".py:", ".json"


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
        try:
            number = math.nan if isinstance(found, str) else float(found)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            why = f"it returned {str(found)[:40]!r}; {about}"
            raise TrainingError("a reward has to be a finite number", where=self.name, why=why)
        return number


@dataclass(frozen=True)
class GraderScorer(Scorer):
    """A grader of a file."""

    grader: Grader

    needs_items = True

    def check(self, row: PromptRow) -> None:
        """Raise `DataError` where a row lacks a field that the grader reads."""
        self.grader.check(row.item, row.where)

    def score(
        self, rows: Sequence[PromptRow], examples: Sequence[Example], batch_tokens: int
    ) -> dict[str, list[float]]:
        """Return the grader's score of each completion, and those of its parts."""
        found = [
            self.grader.grade(example.completion or "", row.item)
            for row, example in zip(rows, examples, strict=True)
        ]
        parts = {f"{self.name}:{name}": [parts[name] for _, parts in found] for name in found[0][1]}
        return {self.name: [number for number, _ in found]} | parts


@dataclass(frozen=True)
class RewardModelScorer(Scorer):
    """A reward model on the policy's own base."""

    base: CausalLM
    active: ActiveAdapters

    @torch.no_grad()
    def score(
        self, rows: Sequence[PromptRow], examples: Sequence[Example], batch_tokens: int
    ) -> dict[str, list[float]]:
        """Return the model's reward of each completion."""
        found = [0.0] * len(examples)
        for indices, chosen in batches_by_length(examples, batch_tokens):
            batch = pack_examples(chosen).to(self.base.device)
            rewards = score_sequences(self.base, batch, self.active).tolist()
            for index, number in zip(indices, rewards, strict=True):
                found[index] = number
        return {self.name: found}


@dataclass(frozen=True)
class RewardFunctions:
    """All scorers of a run, each with its weight."""

    scorers: tuple[tuple[Scorer, float], ...]

    @property
    def needs_items(self) -> bool:
        """Whether a scorer reads more of a row than its prompt and completion."""
        return any(scorer.needs_items for scorer, _ in self.scorers)

    def check(self, row: PromptRow) -> None:
        """Raise `DataError` where a row lacks what a scorer reads."""
        for scorer, _ in self.scorers:
            scorer.check(row)

    def score(
        self, rows: Sequence[PromptRow], examples: Sequence[Example], batch_tokens: int
    ) -> dict[str, Tensor]:
        """Return `reward` `(num_completions,)`, and its parts by name where there are several.

        Args:
            rows: The rows.
            examples: Their completions, as text and as token ids.
            batch_tokens: Tokens of a forward pass.
        """
        parts: dict[str, Tensor] = {}
        for scorer, _ in self.scorers:
            for name, numbers in scorer.score(rows, examples, batch_tokens).items():
                parts[name] = torch.tensor(numbers, dtype=torch.float64)
        weighted = [weight * parts[scorer.name] for scorer, weight in self.scorers]
        found = {"reward": torch.stack(weighted).sum(0)}
        if len(parts) > 1:
            found |= {f"reward_{name}": part for name, part in parts.items()}
        return found

    @property
    def content_hash(self) -> str:
        """Hash of all scorers and their weights."""
        lines = [f"{scorer.content_hash} {weight!r}" for scorer, weight in self.scorers]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the scorers for run.json."""
        return [
            {"name": scorer.name, "weight": weight, "sha256": scorer.content_hash}
            for scorer, weight in self.scorers
        ]


def load_reward_functions(
    options: PolicySettings, base: CausalLM, chat_format: ChatFormat
) -> RewardFunctions:
    """Load the reward functions of the settings; reward models are attached to the base.

    Raises:
        SettingsError: A name is none of a reward function, or a weight is 0 or not finite.
        AdapterError: A reward model belongs to another base.
    """
    given = options.reward_funcs
    weights = given if isinstance(given, dict) else {given: 1.0}
    if not weights:
        raise SettingsError(
            "reward_funcs is empty: at least one reward function is needed",
            where="reward_funcs",
            hint="rules.py:polite",
        )
    for name, weight in weights.items():
        if not math.isfinite(weight) or not weight:
            raise SettingsError(
                f"the weight is {weight}",
                where=f"reward_funcs: {name}",
                hint="a finite number other than 0",
            )
    scorers = []
    for number, (name, weight) in enumerate(weights.items()):
        if name.endswith(GRADER_SUFFIX):
            grader = read_grader(Path(name), options.allow_python_graders)
            scorer: Scorer = GraderScorer(Path(name).name, grader.content, grader)
        elif CODE_SUFFIX in name:
            scorer = _load_function(name)
        else:
            scorer = _load_reward_model(name, base, chat_format, number)
        scorers.append((scorer, weight))
    return RewardFunctions(tuple(scorers))


def _load_function(spec: str) -> FunctionScorer:
    """Return the function of FILE.py:NAME, whose file is executed."""
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
    return FunctionScorer(spec, digest + name, call)


def _load_reward_model(
    run: str, base: CausalLM, chat_format: ChatFormat, number: int
) -> RewardModelScorer:
    """Attach the reward model of a run to the base, frozen."""
    folder = Path(run)
    if not folder.is_dir():
        hint = (
            "FILE.py:FUNCTION, a grader's FILE.json, or the folder of a run of --objective reward"
        )
        raise SettingsError(
            "no such reward function or reward model", where=f"reward_funcs: {run}", hint=hint
        )
    record = read_run_record(folder)
    if record.get("objective") != "reward":
        why = f"it is a run of {record.get('objective')}" if record else "it is not a run"
        hint = "afina train PAIRS --objective reward"
        raise SettingsError("this is no reward model", where=run, why=why, hint=hint)
    learned = ChatFormat.from_record(record, run)
    if (learned.template, learned.kwargs) != (chat_format.template, chat_format.kwargs):
        raise SettingsError(
            "a reward model scores only the format that it was trained on",
            where=run,
            why=f"the reward model was trained with {_describe(learned)}, "
            f"and the policy is trained with {_describe(chat_format)}",
            hint="the same --chat-template and --template-kwargs",
        )
    base.add_score_head()
    adapter = load_adapter(folder, base, f"judge-{number}")
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    adapter.train(False)
    digest = str(read_metadata(adapter_folder(folder)).get("hash"))
    return RewardModelScorer(run, digest, base, adapter.active)


def _describe(chat_format: ChatFormat) -> str:
    arguments = f" and {dict(chat_format.kwargs)}" if chat_format.kwargs else ""
    return f"the chat template {chat_format.template or 'of the tokenizer'}{arguments}"
