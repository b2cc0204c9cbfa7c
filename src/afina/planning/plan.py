"""`afina plan`: what would happen, before it does. Settings, data, one example, numbers to learn, memory and time.

The base is loaded where it is there and fits, so that everything is checked that `afina train` checks before its first
step. Else its configuration is enough: a model of 70B can be asked about on a laptop.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from afina.adapters.base import AdapterConfig, get_method
from afina.adapters.target_selection import layer_index
from afina.data.packing import BatchSampler
from afina.data.renderer import Example
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import SettingsError
from afina.models.loading import load_tokenizer
from afina.models.nf4 import NF4Linear
from afina.objectives.language_modeling import LanguageModelingObjective
from afina.planning.estimate import (
    choose_checkpointing,
    compare,
    detect_machine,
    estimate_run,
    fits,
    full_load,
    largest_batch,
    load_of,
    make_step,
    remedies,
)
from afina.planning.estimates import Workload
from afina.planning.generation_cost import forecast_answers, step_with_generation
from afina.planning.model_shape import ModelShape, read_model_shape
from afina.settings import (
    POLICIES,
    PREFERENCES,
    PlanSettings,
    TrainSettings,
    make_settings,
    resolved,
)
from afina.training.setup.prepare import read_examples, resolve_objective
from afina.training.setup.set_up import RunSetup, default_out, set_up_run

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass
class _Data:
    """What the rows say about a run; nothing of it is known without rows, or without a tokenizer to count them."""

    about: dict[str, Any] = field(default_factory=dict)
    example: str | None = None
    objective: str | None = None
    max_length: int | None = None
    train: list[Example] = field(default_factory=list)
    held_tokens: int = 0


def plan(data: str | Path | TrainSettings | None = None, **values: Any) -> dict[str, Any]:
    """The resolved settings, the data's table, a rendered example, numbers to learn, predicted memory and time.

    With `compare` a line for each method instead. Without `data`, batches are taken to be full.
    """
    if isinstance(data, TrainSettings):
        settings = PlanSettings(**{name: getattr(data, name) for name in data.model_fields_set})
    else:
        settings = make_settings(
            PlanSettings, ({} if data is None else {"data": Path(data)}) | values
        )
    told = {
        name: getattr(settings, name)
        for name in settings.model_fields_set
        if name in TrainSettings.model_fields
    }
    asked = None if settings.data is None else TrainSettings(**told)
    objective = settings.objective if asked is None else resolve_objective(asked)
    if objective in ("classify", "mlm", *PREFERENCES, *POLICIES):
        if asked is None or settings.compare_methods:
            where = "data" if asked is None else "compare_methods"
            why = "what a step of it takes depends on the rows, and on a base that is here"
            raise SettingsError(
                f"{objective} is planned with its rows, one method at a time", where=where, why=why
            )
        answering = set_up_run(asked)
        cost = None if objective in ("classify", "mlm") else _cost_of_answers(settings, answering)
        checked = _checked(answering)
        if cost is not None:
            checked["settings"] |= {"gradient_checkpointing": cost["checkpointing"]["used"]}
        return checked | {"cost": cost}
    place = detect_machine(settings, settings.remeasure)
    shape = read_model_shape(settings, place.device)
    step = make_step(shape, settings, place)
    weights = shape.weight_bytes(step.quantization) + place.libraries
    setup = None
    if (
        asked is not None
        and shape.has_weights
        and fits(weights, place)
        and not settings.compare_methods
    ):
        setup = set_up_run(asked)
        step = make_step(shape, settings, place, setup.adapter.config)
    rows = _rows(setup) if setup else _rows_alone(shape, settings)
    load = load_of(rows.train, settings) if rows.train else full_load(shape, settings)
    steps = setup.steps if setup else _steps(settings, rows.train)
    about = {
        "base": {
            "name": settings.base,
            "parameters": shape.parameters,
            "kinds": shape.parameters_by_kind,
        },
        "steps": steps,
    }
    if settings.compare_methods:
        lines = compare(shape, settings, place, load, steps, rows.held_tokens)
        return about | {
            "data": rows.about,
            "device": place.device,
            "machine_bytes": place.memory,
            "methods": lines,
            "batch": _batch(load),
            "exact": shape.is_exact,
        }
    cost = estimate_run(step, load, place, steps, rows.held_tokens)
    cost |= {
        "device": place.device,
        "machine_bytes": place.memory,
        "batch": _batch(load),
        "exact": shape.is_exact,
        "largest_batch_tokens": largest_batch(
            choose_checkpointing(step, load, place)[0], load, place
        ),
        "largest_batch_tokens_all": largest_batch(step.with_checkpointing(1), load, place),
        "remedies": remedies(shape, settings, place, load) if cost["fits"] is False else [],
    }
    dial = {"gradient_checkpointing": cost["checkpointing"]["used"]}
    if setup:
        checked = _checked(setup)
        checked["settings"] |= dial
        return checked | {
            "base": checked["base"] | {"kinds": shape.parameters_by_kind},
            "cost": cost,
        }
    used = dial | {
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": place.device,
        "max_steps": steps,
    }
    used |= {"objective": rows.objective, "max_length": rows.max_length} if rows.train else {}
    used |= {"output_dir": str(default_out(asked))} if asked else {}
    return about | {
        "settings": resolved(settings) | _targets(step.count.config) | used,
        "data": rows.about,
        "trainable_parameters": step.count.trainable,
        "layers": len(step.count.layers),
        "example": rows.example,
        "cost": cost,
    }


def _cost_of_answers(settings: PlanSettings, setup: RunSetup) -> dict[str, Any]:
    """What preferences and rewards take, on the base that is loaded."""
    place = detect_machine(settings, settings.remeasure)
    shape = read_model_shape(settings, place.device)
    step, answers = step_with_generation(shape, setup, settings, place.device)
    load = answers.load
    cost = forecast_answers(step, answers, place, setup.steps)
    most = [
        largest_batch(one, load, place)
        for one in (choose_checkpointing(step, load, place)[0], step.with_checkpointing(1))
    ]
    return cost | {
        "device": place.device,
        "machine_bytes": place.memory,
        "batch": _batch(load),
        "exact": shape.is_exact,
        "largest_batch_tokens": most[0] and int(most[0] * load.attention_ratio),
        "largest_batch_tokens_all": most[1] and int(most[1] * load.attention_ratio),
        "remedies": remedies(shape, settings, place, load, answers.besides)
        if cost["fits"] is False
        else [],
    }


def _batch(load: Workload) -> dict[str, Any]:
    return {
        "tokens": load.tokens,
        "labels": load.labels,
        "longest": load.max_length,
        "passes": load.num_micro_batches,
    }


def _steps(settings: PlanSettings, train: list[Example]) -> int | None:
    """Optimizer steps of a run, where rows or settings tell."""
    if settings.max_steps is not None or not train:
        return settings.max_steps
    each = BatchSampler(
        train, settings.max_tokens_per_batch, settings.gradient_accumulation_steps, settings.seed
    ).steps_per_epoch
    return max(1, round(settings.num_train_epochs * each))


def _rows(setup: RunSetup) -> _Data:
    """The rows of a run that is set up."""
    task = setup.prepared.task
    assert isinstance(task, LanguageModelingObjective)
    return _Data(train=task.train, held_tokens=sum(len(e.token_ids) for e in task.eval_rows))


def _rows_alone(shape: ModelShape, settings: PlanSettings) -> _Data:
    """The rows by the tokenizer alone, without a model."""
    if settings.data is None:
        return _Data()
    table = read_table(settings.data, SFT, settings.columns, settings.skip_bad_rows)
    about = {"format": table.format, "rows": len(table.rows), "skipped": list(table.skipped)}
    if not any((shape.folder / name).is_file() for name in TOKENIZERS):
        return _Data(about)
    tokenizer = load_tokenizer(shape.folder, settings.base, settings.trust_remote_code)
    made = read_examples(settings, table, tokenizer, shape.max_positions)
    return _Data(
        about={**about, "objective": made.objective, "skipped": made.skipped} | made.counts,
        example=made.renderer.format_loss_mask(made.train[0]),
        objective=made.objective,
        max_length=made.renderer.max_length,
        train=made.train,
        held_tokens=sum(len(e.token_ids) for e in made.eval_examples),
    )


def _checked(setup: RunSetup) -> dict[str, Any]:
    """What a run that is set up would be."""
    prepared, spec = setup.prepared, setup.adapter.config
    return {
        "settings": resolved(setup.settings) | _used(setup),
        "base": {"name": prepared.base.name, "parameters": parameters(prepared.base.model)},
        "data": {
            "format": prepared.data_info["format"],
            "objective": prepared.objective,
            "rows": prepared.data_info["rows"],
            "skipped": prepared.skipped,
        }
        | prepared.counts,
        "steps": setup.steps,
        "trainable_parameters": setup.adapter.num_parameters(),
        "layers": len({*spec.target_modules, *spec.modules_to_save}),
        "example": prepared.example,
    }


def _targets(spec: AdapterConfig) -> dict[str, Any]:
    """What stands for the settings that choose layers."""
    blocks = {number for path in spec.target_modules if (number := layer_index(path)) is not None}
    return {
        "alpha": None if get_method(spec.method).replaces_base else spec.alpha,
        "target_modules": list(dict.fromkeys(path.rpartition(".")[2] for path in spec.target_modules)),
        "layers": sorted(blocks),
    }


def _used(setup: RunSetup) -> dict[str, Any]:
    """What stands in the place of each setting that was left to afina, or that means more than it says."""
    settings, prepared = setup.settings, setup.prepared
    return _targets(setup.adapter.config) | {
        "output_dir": str(default_out(settings)),
        "dtype": str(prepared.base.dtype).removeprefix("torch."),
        "device": prepared.base.device.type,
        "objective": prepared.objective,
        "max_length": prepared.max_length,
        "max_steps": setup.steps,
        "num_train_epochs": round(setup.steps / prepared.task.steps_per_epoch, 2),
        "learning_rate": setup.learning_rate,
        "eval_steps": setup.check_every,
    }


def parameters(model: nn.Module) -> int:
    """How many numbers the base has, however they are stored; those of adapters on it do not count."""
    known: dict[int, int] = {}
    for name, module in model.named_modules():
        if ".deltas." in name:
            continue
        if isinstance(module, NF4Linear):  # two weights a byte, and scales, which are none
            known[id(module.codes)] = module.out_features * module.in_features
            own = [] if module.bias is None else [module.bias]
        else:
            own = list(module.parameters(recurse=False))
        known |= {id(parameter): parameter.numel() for parameter in own}
    return sum(known.values())
