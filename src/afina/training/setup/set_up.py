"""From settings to everything a run needs: what `prepare` gives, an adapter attached, rates, steps. `plan` stops here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.adapters.attach import Adapter, attach
from afina.adapters.presets import get_preset
from afina.adapters.target_selection import layer_index, match_patterns, resolve_target_modules
from afina.io.adapter_config import AdapterConfig
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.objectives.base import Objective
from afina.objectives.prepared import PreparedData
from afina.objectives.reference import select_reference
from afina.settings import Settings, TrainSettings
from afina.training.setup.init_adapter import continue_adapter, stack_on_adapter
from afina.training.setup.prepare import prepare
from afina.training.setup.rank_allocation import resolve_auto_targets

NAME = "adapter"
AUTO = "auto"
ADAPTER_LEARNING_RATE = {False: 2e-4, True: 2e-5}  # of adapters; of full
STORED_NAMES = {"restart_steps": "restart_every"}  # in `options` of afina.json, which is hashed


@dataclass
class RunSetup:
    """A run that has not begun."""

    settings: TrainSettings
    prepared: PreparedData
    adapter: Adapter
    learning_rate: float
    rates: dict[str, float]
    steps: int
    steps_per_rollout: int = 1  # steps between which there is no state to go on from
    why: str | None = None  # why checkpointing is what it is, where it was left to afina

    @property
    def check_every(self) -> int:
        """Steps between checks."""
        return self.settings.eval_steps or self.steps_per_rollout * max(
            1, self.steps // 10 // self.steps_per_rollout
        )

    @property
    def restart_every(self) -> int:
        """Steps between merges and restarts (ReLoRA, ReMoRA); 0 for never."""
        group = self.settings.group(self.adapter.config.method)
        return getattr(group, "restart_steps", None) or 0


def default_out(settings: TrainSettings) -> Path:
    """The run folder: as told, or named after the data and the method."""
    return settings.output_dir or Path("runs") / f"{settings.data.stem}-{settings.method}"


def build_adapter_config(
    model: nn.Module,
    settings: TrainSettings,
    modules: tuple[str, ...] = (),
    invocation: tuple[int, ...] = (),
    tokens: Mapping[str, int] | None = None,
) -> AdapterConfig:
    """The adapter that the settings mean, its targets resolved to paths of the model's modules.

    `modules` are those that it owns whole, `tokens` those with rows of their own, as `prepare` found them.
    """
    blocks = 1 + max((layer_index(path) or 0 for path, _ in model.named_modules()), default=0)
    meant = get_preset(settings.method, blocks)
    told = (
        "all-linear" if settings.target_modules == AUTO else settings.target_modules
    )  # before there is a gradient to look at
    targets = told if told is not None else meant.targets
    layers = settings.layers if settings.layers is not None else meant.layers
    paths = resolve_target_modules(model, targets, layers, any_kind=meant.targets == "all")
    return AdapterConfig(
        method=meant.method,
        target_modules=tuple(path for path in paths if path not in modules),
        rank=settings.rank,
        alpha=settings.alpha if settings.alpha is not None else 2.0 * settings.rank,
        scaling=settings.scaling,
        dropout=settings.dropout,
        rank_pattern=match_patterns(settings.rank_pattern, paths, "rank_pattern"),
        modules_to_save=modules,
        invocation=invocation,
        trainable_tokens=tokens or {},
        method_settings=method_settings(settings.group(meant.method)),
    )


def method_settings(group: Settings) -> dict[str, Any]:
    """Return a method's settings that are given, under the names that adapter files keep for ever."""
    given = group.model_dump(exclude_none=True)
    return {STORED_NAMES.get(name, name): value for name, value in given.items()}


def set_up_run(
    settings: TrainSettings, base: CausalLM | Classifier | None = None, name: str = NAME
) -> RunSetup:
    """Load, read, render, check and attach under `name`; raises the error of the first thing that is wrong.

    `base` is a language model that is loaded already, and on which others learn, or a classifier made in Python.
    """
    torch.manual_seed(settings.seed)  # a classifier's new head is drawn when its base is loaded
    prepared = prepare(settings, base)
    if settings.target_modules == AUTO:
        settings = resolve_auto_targets(settings, prepared)
    spec = build_adapter_config(
        prepared.base.model,
        settings,
        prepared.modules_to_save,
        prepared.invocation,
        prepared.trainable_tokens,
    )
    torch.manual_seed(settings.seed)
    if settings.init_adapter is not None:
        adapter = continue_adapter(settings, prepared, spec, name)
    else:
        adapter = attach(
            prepared.base.model, prepared.base.forward_context, name, spec, settings.seed
        )
    if settings.frozen_adapter is not None:
        stack_on_adapter(settings, prepared, adapter, name)
    began = (
        "+".join(digest for digest in (prepared.init_adapter, prepared.frozen_adapter) if digest)
        or None
    )
    task, method = prepared.task, adapter.config.method
    task.policy = adapter.active
    if task.needs_reference:
        task.reference = select_reference(
            task.options, prepared.baseline, began, adapter.config.dropout
        )
    learned = (*adapter.config.target_modules, *adapter.config.modules_to_save)
    rate = settings.learning_rate or default_learning_rate(method, task)
    rates = match_patterns(settings.learning_rate_pattern, learned, "learning_rate_pattern")
    if task.head and not task.saves_head:  # it starts at zero, and has everything to learn
        head = max(rate, ADAPTER_LEARNING_RATE[method == "full"])
        rates = dict.fromkeys(adapter.config.modules_to_save, head) | rates
    return RunSetup(
        settings=settings,
        prepared=prepared,
        adapter=adapter,
        learning_rate=rate,
        rates=rates,
        steps=settings.max_steps
        or max(1, round(settings.num_train_epochs * prepared.task.steps_per_epoch)),
        steps_per_rollout=task.steps_per_rollout,
    )


def default_learning_rate(method: str, objective: type[Objective] | Objective) -> float:
    """Return the usual learning rate of a method, scaled by the objective's factor."""
    return ADAPTER_LEARNING_RATE[method == "full"] * objective.default_learning_rate_factor
