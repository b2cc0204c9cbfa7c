"""Setup of a run: base and data, an attached adapter, learning rates, number of steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.adapters.attach import Adapter, attach
from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
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
# Peak rates on a base of hidden size 4,096. Narrower bases take larger ones: an adapter's grows as
# 1 / width, as a hidden matrix's does under muP (arXiv 2203.03466), that of full as its root.
ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE = 2e-4, 2e-5
REFERENCE_WIDTH, MAX_WIDTH_RATIO = 4096, 16.0
DEFAULT_EPOCHS = 3.0
STORED_NAMES = {"restart_steps": "restart_every"}  # in `options` of afina.json, which is hashed


@dataclass
class RunSetup:
    """A run that has not begun.

    Attributes:
        rates: Learning rates of modules by path, where they have their own.
        steps_per_rollout: Optimizer steps between which there is no state to resume from.
        why: The reason for an automatic checkpointing level.
        planned_memory_mb: Peak memory that was predicted with that level.
    """

    settings: TrainSettings
    prepared: PreparedData
    adapter: Adapter
    learning_rate: float
    rates: dict[str, float]
    steps: int
    steps_per_rollout: int = 1
    why: str | None = None
    planned_memory_mb: float | None = None

    @property
    def check_every(self) -> int:
        """Optimizer steps between evaluations."""
        rollouts = max(1, self.steps // 10 // self.steps_per_rollout)
        return self.settings.eval_steps or self.steps_per_rollout * rollouts

    @property
    def restart_every(self) -> int:
        """Optimizer steps between merges and restarts (ReLoRA, ReMoRA); 0 for never."""
        group = self.settings.group(self.adapter.config.method)
        return getattr(group, "restart_steps", None) or 0


def default_out(settings: TrainSettings) -> Path:
    """Return the run folder: as given, or a free one that is named after data and method."""
    if settings.output_dir is not None:
        return settings.output_dir
    folder = Path("runs") / f"{settings.data_name}-{settings.method}"
    return folder if settings.overwrite else free_folder(folder, bool(settings.resume))


def free_folder(folder: Path, is_resume: bool) -> Path:
    """Return the first free of `folder`, `folder-2`, ...; to resume, the last that is not free."""
    last, numbered = folder, (folder.with_name(f"{folder.name}-{n}") for n in count(2))
    for free in chain([folder], numbered):
        if not free.exists() or (free.is_dir() and not any(free.iterdir())):
            break
        last = free
    return last if is_resume else free


def build_adapter_config(
    model: nn.Module,
    settings: TrainSettings,
    modules: tuple[str, ...] = (),
    invocation: tuple[int, ...] = (),
    tokens: Mapping[str, int] | None = None,
) -> AdapterConfig:
    """Return the adapter that the settings describe, its targets resolved to paths of modules.

    Args:
        model: The model.
        settings: The settings; target modules "auto" count as all linear ones here.
        modules: Paths of the modules that the adapter saves in full.
        invocation: Tokens from which on an activated adapter is active.
        tokens: Tokens whose embedding rows are trained.
    """
    num_layers = 1 + max((layer_index(path) or 0 for path, _ in model.named_modules()), default=0)
    preset = get_preset(settings.method, num_layers)
    given = "all-linear" if settings.target_modules == AUTO else settings.target_modules
    targets = given if given is not None else preset.targets
    layers = settings.layers if settings.layers is not None else preset.layers
    supported = get_method(preset.method).supported_modules
    paths = resolve_target_modules(
        model, targets, layers, preset.targets == "all", experts=supported == "experts"
    )
    return AdapterConfig(
        method=preset.method,
        target_modules=tuple(path for path in paths if path not in modules),
        rank=settings.rank,
        alpha=settings.alpha if settings.alpha is not None else 2.0 * settings.rank,
        scaling=settings.scaling,
        dropout=settings.dropout,
        rank_pattern=match_patterns(settings.rank_pattern, paths, "rank_pattern"),
        modules_to_save=modules,
        invocation=invocation,
        trainable_tokens=tokens or {},
        method_settings=method_settings(settings.group(preset.method)),
    )


def method_settings(group: Settings) -> dict[str, Any]:
    """Return the given settings of a method, under the constant names of adapter files."""
    given = group.model_dump(exclude_none=True)
    return {STORED_NAMES.get(name, name): value for name, value in given.items()}


def set_up_run(
    settings: TrainSettings, base: CausalLM | Classifier | None = None, name: str = NAME
) -> RunSetup:
    """Load the base, read and check the rows, and attach the adapter under `name`.

    Args:
        settings: The settings of the run.
        base: A language model that is loaded already and that runs share, or a classifier built
            in Python.
        name: Name of the adapter.

    Raises:
        AfinaError: The first problem of settings, base or data.
    """
    torch.manual_seed(settings.seed)  # a classifier's new head is initialized with its base
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
    digests = [d for d in (prepared.init_adapter, prepared.frozen_adapter) if d]
    task, method = prepared.task, adapter.config.method
    task.policy = adapter.active
    if task.needs_reference:
        began_with = "+".join(digests) or None
        task.reference = select_reference(
            task.options, prepared.baseline, began_with, adapter.config.dropout
        )
    trained = (*adapter.config.target_modules, *adapter.config.modules_to_save)
    width = prepared.base.hidden_size
    rate = settings.learning_rate or default_learning_rate(method, task, width)
    rates = match_patterns(settings.learning_rate_pattern, trained, "learning_rate_pattern")
    if task.head and not task.saves_head:  # it is initially zero, and needs a higher rate
        head = max(rate, method_learning_rate(method, width))
        rates = dict.fromkeys(adapter.config.modules_to_save, head) | rates
    return RunSetup(
        settings=settings,
        prepared=prepared,
        adapter=adapter,
        learning_rate=rate,
        rates=rates,
        steps=run_length(settings, task, task.steps_per_epoch),
        steps_per_rollout=task.steps_per_rollout,
    )


def run_length(
    settings: TrainSettings, objective: type[Objective] | Objective, steps_per_epoch: int
) -> int:
    """Return the optimizer steps of a run: as given, or 3 epochs and at least the objective's."""
    if settings.max_steps is not None:
        return settings.max_steps
    if settings.num_train_epochs is not None:
        return max(1, round(settings.num_train_epochs * steps_per_epoch))
    return max(objective.min_default_steps, round(DEFAULT_EPOCHS * steps_per_epoch))


def method_learning_rate(method: str, width: int | None) -> float:
    """Return the usual peak learning rate of a method on a base of hidden size `width`."""
    ratio = min(MAX_WIDTH_RATIO, REFERENCE_WIDTH / width) if width else 1.0
    if method == "full":
        return FULL_LEARNING_RATE * ratio**0.5
    return ADAPTER_LEARNING_RATE * ratio


def default_learning_rate(
    method: str, objective: type[Objective] | Objective, width: int | None
) -> float:
    """Return the usual learning rate of a method, scaled by the objective's factor."""
    return method_learning_rate(method, width) * objective.default_learning_rate_factor
