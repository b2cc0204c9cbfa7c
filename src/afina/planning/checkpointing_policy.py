"""Choice of the gradient checkpointing level where the setting is "auto".

Of off, every fourth layer, every third, every second and all, the first with which a run fits: each
level takes less memory and more time than the one before. `afina plan` prints the level and the
reason; `afina.train` uses the same function.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from afina.errors import TrainingError
from afina.models.classifier import Classifier
from afina.objectives.language_modeling import LanguageModelingObjective
from afina.objectives.policy import PolicyObjective
from afina.objectives.preference import PairwiseObjective
from afina.planning.estimate import choose_checkpointing, detect_machine, load_of
from afina.planning.estimates import Workload
from afina.planning.generation_cost import step_with_generation
from afina.planning.model_shape import count_parameters, read_model_shape
from afina.planning.step_cost import StepCost
from afina.settings import TrainSettings
from afina.training import train as run
from afina.training.setup.set_up import RunSetup
from afina.training.train import TrainResult


def choose(setups: Sequence[RunSetup]) -> tuple[str | int, str | None]:
    """The dial of runs that share a base and its passes, and why."""
    settings = setups[0].settings
    if len(setups) == 1 and isinstance(
        setups[0].prepared.task, PairwiseObjective | PolicyObjective
    ):
        place = detect_machine(settings, measure=False)
        step, answers = step_with_generation(
            read_model_shape(settings, place.device), setups[0], settings, place.device
        )
        return choose_checkpointing(step, answers.load, place)[1:]
    if not all(isinstance(setup.prepared.task, LanguageModelingObjective) for setup in setups):
        return "off", "memory is not predicted for what learns here"
    place = detect_machine(settings, measure=False)
    shape, quantization = (
        read_model_shape(settings, place.device),
        setups[0].prepared.base.quantization,  # type: ignore[attr-defined]
    )
    steps = [
        StepCost(
            shape, count_parameters(shape, s.adapter.config), s.settings, quantization, place.device
        )
        for s in setups
    ]
    load = _together([_load(setup) for setup in setups])
    memories = [step.memory(load, 0.0) for step in steps]
    largest = max(range(len(steps)), key=lambda number: memories[number].activations)
    others = [n for n in range(len(steps)) if n != largest]
    besides = sum(
        memories[n].learned + memories[n].optimizer + 4.0 * steps[n].count.trainable for n in others
    )
    return choose_checkpointing(steps[largest], load, place, besides)[1:]


def _load(setup: RunSetup) -> Workload:
    task = setup.prepared.task
    assert isinstance(task, LanguageModelingObjective)
    return load_of(task.train, setup.settings)


def _together(loads: Sequence[Workload]) -> Workload:
    """Passes of several runs side by side."""
    tokens, labels = sum(load.tokens for load in loads), sum(load.labels for load in loads)
    return replace(max(loads, key=lambda load: load.max_length), tokens=tokens, labels=labels)


def train(
    data: str | Path | TrainSettings,
    *,
    quiet: bool = True,
    model: Classifier | None = None,
    **values: Any,
) -> TrainResult:
    """`afina.training.train.train`, with the dial of checkpointing turned by the plan."""
    return run.train(data, quiet=quiet, model=model, choose=choose, **values)


def train_many(
    runs: Sequence[TrainSettings], *, quiet: bool = True, model: Classifier | None = None
) -> list[TrainResult | TrainingError]:
    """`afina.training.train.train_many`, with the dial of checkpointing turned by the plan."""
    return run.train_many(runs, quiet=quiet, model=model, choose=choose)
