"""From settings to everything a run needs: what `prepare` gives, an adapter attached, rates, steps. `plan` stops here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from afina.base.classifier import Classifier
from afina.base.model import Base
from afina.config import POLICIES, PREFERENCES, PolicyOptions, PreferenceOptions, TrainSettings
from afina.delta.attach import Adapter, attach
from afina.delta.contract import Spec
from afina.delta.presets import preset
from afina.delta.targets import block_number, by_pattern, resolve_targets
from afina.errors import SettingsError
from afina.objective.choices import PreferenceTask
from afina.objective.preference import COMPARED
from afina.objective.reference import choose_reference
from afina.objective.rollout import PolicyTask
from afina.training.energy import BUDGET, automatic
from afina.training.prepare import objective_of, prepare
from afina.training.prepared import NEW_TOKENS, OVER, START, Prepared
from afina.training.start import go_on_from, learn_over

NAME = "adapter"
AUTO = "auto"


@dataclass
class Setup:
    """A run that has not begun."""

    settings: TrainSettings
    prepared: Prepared
    adapter: Adapter
    learning_rate: float
    rates: dict[str, float]
    steps: int
    together: int = 1  # steps between which there is no state to go on from
    why: str | None = None  # why checkpointing is what it is, where it was left to afina

    @property
    def check_every(self) -> int:
        """Steps between checks."""
        return self.settings.check_every or self.together * max(1, self.steps // 10 // self.together)

    @property
    def restart_every(self) -> int:
        """Steps between merges and restarts (ReLoRA, ReMoRA); 0 for never."""
        every = self.settings.options.get("restart_every", 0)
        if not isinstance(every, int) or every < 0:
            raise SettingsError(f"restart_every cannot be {every!r}", where="options", hint="a number of steps")
        return every


def default_out(settings: TrainSettings) -> Path:
    """The run folder: as told, or named after the data and the method."""
    return settings.out or Path("runs") / f"{settings.data.stem}-{settings.method}"


def make_spec(
    model: nn.Module,
    settings: TrainSettings,
    modules: tuple[str, ...] = (),
    invocation: tuple[int, ...] = (),
    tokens: Mapping[str, int] | None = None,
) -> Spec:
    """The adapter that the settings mean, its targets resolved to paths of the model's modules.

    `modules` are those that it owns whole, `tokens` those with rows of their own, as `prepare` found them.
    """
    blocks = 1 + max((block_number(path) or 0 for path, _ in model.named_modules()), default=0)
    meant = preset(settings.method, blocks)
    told = "all-linear" if settings.targets == AUTO else settings.targets  # before there is a gradient to look at
    targets = told if told is not None else meant.targets
    layers = settings.layers if settings.layers is not None else meant.layers
    paths = resolve_targets(model, targets, layers, any_kind=meant.targets == "all")
    return Spec(
        method=meant.delta,
        targets=tuple(path for path in paths if path not in modules),
        rank=settings.rank,
        alpha=settings.alpha if settings.alpha is not None else 2.0 * settings.rank,
        scaling=settings.scaling,
        dropout=settings.dropout,
        ranks=by_pattern(settings.ranks, paths, "ranks"),
        modules=modules,
        invocation=invocation,
        tokens=tokens or {},
        options={name: value for name, value in settings.options.items() if name not in _others(settings)},
    )


def _others(settings: TrainSettings) -> tuple[str, ...]:
    """The names in `options` that are not the method's."""
    objective = objective_of(settings)
    own = PreferenceOptions if objective in PREFERENCES else PolicyOptions if objective in POLICIES else None
    return (NEW_TOKENS, START, OVER, BUDGET, *(own.model_fields if own else ()))


def set_up(settings: TrainSettings, base: Base | Classifier | None = None, name: str = NAME) -> Setup:
    """Load, read, render, check and attach under `name`; raises the error of the first thing that is wrong.

    `base` is a language model that is loaded already, and on which others learn, or a classifier made in Python.
    """
    torch.manual_seed(settings.seed)  # a classifier's new head is drawn when its base is loaded
    prepared = prepare(settings, base)
    if settings.targets == AUTO:
        settings = automatic(settings, prepared)
    spec = make_spec(prepared.base.model, settings, prepared.modules, prepared.invocation, prepared.tokens)
    torch.manual_seed(settings.seed)
    if START in settings.options:
        adapter = go_on_from(settings, prepared, spec, name)
    else:
        adapter = attach(prepared.base.model, prepared.base.board, name, spec, settings.seed)
    if OVER in settings.options:
        learn_over(settings, prepared, adapter, name)
    began = "+".join(digest for digest in (prepared.start, prepared.over) if digest) or None
    if isinstance(prepared.task, PreferenceTask) and prepared.objective in COMPARED:
        options = prepared.task.options
        prepared.task.reference = choose_reference(options, prepared.before, began, adapter.spec.dropout)
    learned = (*adapter.spec.targets, *adapter.spec.modules)
    rate = settings.learning_rate or default_rate(adapter.spec.method, prepared.objective)
    rates, together = by_pattern(settings.learning_rates, learned, "learning_rates"), 1
    if isinstance(task := prepared.task, PolicyTask):
        task.policy = adapter.route
        task.reference = choose_reference(task.options, prepared.before, began, adapter.spec.dropout)
        together = task.options.updates
        head = max(rate, default_rate(adapter.spec.method, "reward"))  # a new head has everything to learn
        rates = dict.fromkeys(adapter.spec.modules, head) | rates
    return Setup(
        settings=settings,
        prepared=prepared,
        adapter=adapter,
        learning_rate=rate,
        rates=rates,
        steps=settings.steps or max(1, round(settings.epochs * prepared.task.steps_per_epoch)),
        together=together,
    )


def default_rate(method: str, objective: str) -> float:
    """Usual rates: preferences are learned from where the model already is good, in small steps; a new head is not."""
    small = objective in (*PREFERENCES, *POLICIES) and objective != "reward"
    return (2e-5 if method == "full" else 2e-4) * (0.1 if small else 1.0)
