"""Who says how good an answer is: Python functions, reward models, graders, or several of them with weights.

    rules.py:polite     def polite(prompt: str, answer: str, reference: str | None) -> float
    runs/judge          a run of --objective reward on the same base; it acts on the base beside the policy, nothing is copied
    grader.json         a grader as OpenAI's API describes it (see `graders`)

The number of an answer is the sum of weight times number. A function is the user's own code, and is run as such.
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
from afina.data.packing import group_by_length, pack_examples
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

CODE, GRADER = ".py:", ".json"


@dataclass(frozen=True)
class FunctionScorer:
    """A Python function that judges; `content` is the sha256 of its file."""

    name: str
    call: Callable[[str, str, str | None], Any]
    content_hash: str

    def score(self, rows: Sequence[PromptRow], answers: Sequence[str]) -> list[float]:
        """A number for each answer; raises `TrainingError` where the function fails or gives none."""
        return [self._one(row, answer) for row, answer in zip(rows, answers, strict=True)]

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
            why = f"it gave {str(found)[:40]!r}; {about}"
            raise TrainingError("a reward has to be a finite number", where=self.name, why=why)
        return number


@dataclass(frozen=True)
class GraderScorer:
    """A grader of a file."""

    name: str
    grader: Grader
    content_hash: str

    def score(self, rows: Sequence[PromptRow], answers: Sequence[str]) -> dict[str, list[float]]:
        """A number for each answer, and under their names those of the grader's parts."""
        found = [
            self.grader.grade(answer, row.item) for row, answer in zip(rows, answers, strict=True)
        ]
        parts = {f"{self.name}:{name}": [parts[name] for _, parts in found] for name in found[0][1]}
        return {self.name: [number for number, _ in found]} | parts


@dataclass(frozen=True)
class RewardModelScorer:
    """A reward model on the policy's own base."""

    name: str
    base: CausalLM
    active: ActiveAdapters
    content_hash: str

    @torch.no_grad()
    def score(self, examples: Sequence[Example], batch_tokens: int) -> list[float]:
        """A number for each prompt with its answer."""
        found = [0.0] * len(examples)
        for indices in group_by_length(
            [len(example.token_ids) for example in examples], batch_tokens, range(len(examples))
        ):
            batch = pack_examples([examples[i] for i in indices]).to(self.base.device)
            for index, number in zip(
                indices, score_sequences(self.base, batch, self.active).tolist(), strict=True
            ):
                found[index] = number
        return found


@dataclass(frozen=True)
class RewardFunctions:
    """All who judge, each with its weight."""

    scorers: tuple[tuple[FunctionScorer | RewardModelScorer | GraderScorer, float], ...]

    @property
    def needs_items(self) -> bool:
        """Whether some of them look at more of a row than its prompt and answer."""
        return any(isinstance(judge, GraderScorer) for judge, _ in self.scorers)

    def check(self, row: PromptRow) -> None:
        """Raise `DataError` where a row has not what those who judge look at."""
        for judge, _ in self.scorers:
            if isinstance(judge, GraderScorer):
                judge.grader.check(row.item, row.where)

    def score(
        self, rows: Sequence[PromptRow], examples: Sequence[Example], batch_tokens: int
    ) -> dict[str, Tensor]:
        """The reward of each answer (n), and under their names the parts that it has where there are several.

        `examples` are the rows with their answers, as text and as tokens; those who read tokens read `batch_tokens` at a time.
        """
        texts = [example.completion or "" for example in examples]
        parts: dict[str, list[float]] = {}
        for judge, _ in self.scorers:
            if isinstance(judge, GraderScorer):
                parts |= judge.score(rows, texts)
            elif isinstance(judge, FunctionScorer):
                parts[judge.name] = judge.score(rows, texts)
            else:
                parts[judge.name] = judge.score(examples, batch_tokens)
        made = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in parts.items()}
        total = torch.stack([weight * made[judge.name] for judge, weight in self.scorers]).sum(0)
        return {"reward": total} | (
            {f"reward_{name}": part for name, part in made.items()} if len(made) > 1 else {}
        )

    @property
    def content_hash(self) -> str:
        """What tells that the same judges judge."""
        lines = [f"{judge.content_hash} {weight!r}" for judge, weight in self.scorers]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_dicts(self) -> list[dict[str, Any]]:
        """For run.json."""
        return [
            {"name": judge.name, "weight": weight, "sha256": judge.content_hash}
            for judge, weight in self.scorers
        ]


def load_reward_functions(
    options: PolicySettings, base: CausalLM, chat_format: ChatFormat
) -> RewardFunctions:
    """Load all who judge; raises `SettingsError` where one is none, `AdapterError` where it is another base's."""
    told = (
        options.reward_funcs
        if isinstance(options.reward_funcs, dict)
        else {options.reward_funcs: 1.0}
    )
    if not told:
        raise SettingsError(
            "reward_funcs is empty: at least one reward function is needed",
            where="reward_funcs",
            hint="rules.py:polite",
        )
    for name, weight in told.items():
        if not math.isfinite(weight) or not weight:
            raise SettingsError(
                f"the weight is {weight}",
                where=f"reward_funcs: {name}",
                hint="a finite number other than 0",
            )
    made = [
        _one(name, options.allow_python_graders) or _judge(name, base, chat_format, n)
        for n, name in enumerate(told)
    ]
    return RewardFunctions(tuple(zip(made, told.values(), strict=True)))


def _one(told: str, run_python: bool) -> FunctionScorer | GraderScorer | None:
    """The function or grader that a name means; None for a reward model's."""
    if told.endswith(GRADER):
        grader = read_grader(Path(told), run_python)
        return GraderScorer(Path(told).name, grader, grader.content)
    return _function(told) if CODE in told else None


def _function(told: str) -> FunctionScorer:
    """FILE.py:NAME."""
    file, _, name = told.rpartition(":")
    path, where = Path(file), f"reward_funcs: {told}"
    if not path.is_file():
        raise SettingsError(
            "no such file",
            where=where,
            hint="FILE.py:FUNCTION, as seen from where afina was started",
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"afina_reward_{digest[:12]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise SettingsError(
            "the file cannot be run", where=where, why=f"{type(error).__name__}: {error}"
        ) from error
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
    return FunctionScorer(told, call, digest + name)


def _judge(told: str, base: CausalLM, chat_format: ChatFormat, number: int) -> RewardModelScorer:
    """The run of a reward model."""
    folder = Path(told)
    if not folder.is_dir():
        hint = (
            "FILE.py:FUNCTION, a grader's FILE.json, or the folder of a run of --objective reward"
        )
        raise SettingsError(
            "no such reward function or reward model", where=f"reward_funcs: {told}", hint=hint
        )
    story = read_run_record(folder)
    if story.get("objective") != "reward":
        why = f"it is a run of {story.get('objective')}" if story else "it is no run"
        raise SettingsError(
            "this is no reward model",
            where=told,
            why=why,
            hint="afina train PAIRS --objective reward",
        )
    learned = ChatFormat.from_record(story, told)
    if (learned.template, learned.kwargs) != (chat_format.template, chat_format.kwargs):
        why = (
            f"the reward model was trained with {_describe(learned)}, "
            f"and the policy is trained with {_describe(chat_format)}"
        )
        raise SettingsError(
            "a reward model scores only the format that it was trained on",
            where=told,
            why=why,
            hint="the same --chat-template and --template-kwargs",
        )
    base.add_score_head()
    adapter = load_adapter(folder, base, f"judge-{number}")
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    adapter.train(False)
    return RewardModelScorer(
        told, base, adapter.active, str(read_metadata(adapter_folder(folder)).get("hash"))
    )


def _describe(chat_format: ChatFormat) -> str:
    arguments = f" and {dict(chat_format.kwargs)}" if chat_format.kwargs else ""
    return f"the chat template {chat_format.template or 'of the tokenizer'}{arguments}"
