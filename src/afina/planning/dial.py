"""How much of a run's activations to make again in the backward pass, where that was left to afina.

Of off, each fourth block, each third, each second and all, the first with which a run fits: each step of the dial takes
less memory and more time than the one before. `afina plan` shows what it chose, and why; `afina.train` uses the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from afina.base.classifier import Classifier
from afina.config import TrainSettings
from afina.errors import TrainingError
from afina.objective.choices import ChoiceTask
from afina.objective.language import LanguageTask
from afina.objective.rollout import PolicyTask
from afina.planning.answers import step_of
from afina.planning.cost import Step
from afina.planning.figures import Load
from afina.planning.forecast import find_place, load_of, turn
from afina.planning.shape import count, read_shape
from afina.training import run
from afina.training.run import Run
from afina.training.setup import Setup


def choose(setups: Sequence[Setup]) -> tuple[str | int, str | None]:
    """The dial of runs that share a base and its passes, and why."""
    settings = setups[0].settings
    if len(setups) == 1 and isinstance(setups[0].prepared.task, ChoiceTask | PolicyTask):
        place = find_place(settings, measure=False)
        step, answers = step_of(read_shape(settings, place.device), setups[0], settings, place.device)
        return turn(step, answers.load, place)[1:]
    if not all(isinstance(setup.prepared.task, LanguageTask) for setup in setups):
        return "off", "memory is not predicted for what learns here"
    place = find_place(settings, measure=False)
    shape, storage = read_shape(settings, place.device), setups[0].prepared.base.storage  # type: ignore[attr-defined]
    steps = [Step(shape, count(shape, s.adapter.spec), s.settings, storage, place.device) for s in setups]
    load = _together([_load(setup) for setup in setups])
    memories = [step.memory(load, 0.0) for step in steps]
    largest = max(range(len(steps)), key=lambda number: memories[number].activations)
    others = [n for n in range(len(steps)) if n != largest]
    besides = sum(memories[n].learned + memories[n].optimizer + 4.0 * steps[n].count.trainable for n in others)
    return turn(steps[largest], load, place, besides)[1:]


def _load(setup: Setup) -> Load:
    task = setup.prepared.task
    assert isinstance(task, LanguageTask)
    return load_of(task.train, setup.settings)


def _together(loads: Sequence[Load]) -> Load:
    """Passes of several runs side by side."""
    tokens, labels = sum(load.tokens for load in loads), sum(load.labels for load in loads)
    return replace(max(loads, key=lambda load: load.length), tokens=tokens, labels=labels)


def train(data: str | Path | TrainSettings, *, quiet: bool = True, model: Classifier | None = None, **values: Any) -> Run:
    """`afina.training.run.train`, with the dial of checkpointing turned by the plan."""
    return run.train(data, quiet=quiet, model=model, choose=choose, **values)


def train_many(
    runs: Sequence[TrainSettings], *, quiet: bool = True, model: Classifier | None = None
) -> list[Run | TrainingError]:
    """`afina.training.run.train_many`, with the dial of checkpointing turned by the plan."""
    return run.train_many(runs, quiet=quiet, model=model, choose=choose)
