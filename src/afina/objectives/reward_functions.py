"""Reward functions of completions: Python functions, reward models and graders, with weights.

    rules.py:polite   a Python function, see `python_rewards`
    runs/judge        a run of --objective reward on the same base, which is in memory only once
    grader.json       a grader as OpenAI's API describes it (see `graders`)

The reward of a completion is the sum of weight times score.
"""

import hashlib
import math
from collections.abc import Sequence
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
from afina.errors import SettingsError, TrainingError
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.io.chat_format import ChatFormat
from afina.io.run_record import read_run_record
from afina.models.causal_lm import CausalLM
from afina.objectives.graders import Grader, read_grader
from afina.objectives.python_rewards import Scorer, load_function
from afina.objectives.reward_model import score_sequences
from afina.settings import PolicySettings

CODE_SUFFIX, GRADER_SUFFIX = ".py:", ".json"


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

        A score of None (not a number) counts as 0.

        Args:
            rows: The rows.
            examples: Their completions, as text and as token ids.
            batch_tokens: Tokens of a forward pass.

        Raises:
            TrainingError: A scorer fails, or none of them has a score for a completion.
        """
        parts: dict[str, Tensor] = {}
        for scorer, _ in self.scorers:
            for name, numbers in scorer.score(rows, examples, batch_tokens).items():
                parts[name] = torch.tensor(numbers, dtype=torch.float64)
        self._check_any([parts[scorer.name] for scorer, _ in self.scorers], rows, examples)
        parts = {name: part.nan_to_num(0.0) for name, part in parts.items()}
        weighted = [weight * parts[scorer.name] for scorer, weight in self.scorers]
        found = {"reward": torch.stack(weighted).sum(0)}
        if len(parts) > 1:
            found |= {f"reward_{name}": part for name, part in parts.items()}
        return found

    @staticmethod
    def _check_any(
        scores: Sequence[Tensor], rows: Sequence[PromptRow], examples: Sequence[Example]
    ) -> None:
        """Raise `TrainingError` where every scorer returned None for a completion."""
        is_missing = torch.stack(list(scores)).isnan().all(0)
        if is_missing.any():
            first = int(is_missing.nonzero()[0])
            completion = (examples[first].completion or "")[:80]
            raise TrainingError(
                "every reward function returned None",
                where="reward_funcs",
                why=f"prompt {rows[first].where}, answer {completion!r}",
                hint="one of them has to return a number for each completion",
            )

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
            scorer = load_function(name)
        else:
            scorer = _load_reward_model(name, base, chat_format, number)
        scorers.append((scorer, weight))
    return RewardFunctions(tuple(scorers))


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
