"""`afina plan`: settings, data, one example, trainable parameters, memory and time before a run.

The base is loaded where it is present and fits, so that everything is checked that `afina train`
checks before its first step. Otherwise its configuration is enough: a 70B model can be planned on a
laptop.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from afina.adapters.registry import get_method
from afina.adapters.target_selection import layer_index
from afina.data.packing import BatchSampler
from afina.data.renderer import Example
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.loading import load_tokenizer
from afina.models.nf4 import NF4Linear
from afina.objectives.language_data import read_examples
from afina.objectives.language_modeling import LanguageModelingObjective
from afina.planning.estimate import (
    Machine,
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
from afina.planning.results import MethodsPlanResult, PlanResult
from afina.planning.step_cost import StepCost
from afina.settings import (
    POLICIES,
    PREFERENCES,
    PlanSettings,
    TrainSettings,
    make_settings,
    resolved,
)
from afina.training.setup.prepare import resolve_objective
from afina.training.setup.set_up import RunSetup, default_out, set_up_run

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass
class _Data:
    """Facts of the rows; unknown without rows, or without a tokenizer to count their tokens."""

    about: dict[str, Any] = field(default_factory=dict)
    example: str | None = None
    objective: str | None = None
    max_length: int | None = None
    train: list[Example] = field(default_factory=list)
    held_tokens: int = 0


def plan(
    data: str | Path | TrainSettings | None = None, **values: Any
) -> PlanResult | MethodsPlanResult:
    """Return the resolved settings, the data's figures, an example, and predicted memory and time.

    With `compare_methods` the result has a row for each method instead. Without `data`, batches are
    taken to be full.

    Raises:
        SettingsError: A setting is wrong, or the objective can be planned only with its rows.

    Example:
        >>> afina.plan("rows.jsonl", method="qlora")["cost"]["peak_bytes"]
    """
    if isinstance(data, TrainSettings):
        settings = PlanSettings(**{name: getattr(data, name) for name in data.model_fields_set})
    else:
        given = {} if data is None else {"data": Path(data)}
        settings = make_settings(PlanSettings, given | values)
    train_settings = _train_settings(settings)
    objective = settings.objective
    if train_settings is not None:
        objective = resolve_objective(train_settings)
    if objective in ("classify", "mlm", *PREFERENCES, *POLICIES):
        return _plan_with_rows(settings, train_settings, objective)
    return _plan_language_modeling(settings, train_settings)


def _train_settings(settings: PlanSettings) -> TrainSettings | None:
    """Return the settings of the run that is planned; None without data."""
    if settings.data is None:
        return None
    given = settings.model_fields_set & TrainSettings.model_fields.keys()
    groups = settings.model_extra or {}  # of the method and the objective
    return TrainSettings(**{name: getattr(settings, name) for name in given}, **groups)


def _plan_with_rows(
    settings: PlanSettings, train_settings: TrainSettings | None, objective: str
) -> PlanResult:
    """Return the plan of an objective whose steps depend on the rows and on a base that is here."""
    if train_settings is None or settings.compare_methods:
        raise SettingsError(
            f"{objective} is planned with its rows, one method at a time",
            where="data" if train_settings is None else "compare_methods",
            why="the cost of its step depends on the rows, and on a base that is here",
        )
    setup = set_up_run(train_settings)
    checked = _checked(setup)
    cost = None
    if objective not in ("classify", "mlm"):
        cost = _cost_with_generation(settings, setup)
        checked["settings"] |= {"gradient_checkpointing": cost["checkpointing"]["used"]}
    return PlanResult(**checked, cost=cost)


def _plan_language_modeling(
    settings: PlanSettings, train_settings: TrainSettings | None
) -> PlanResult | MethodsPlanResult:
    """Return the plan of sft or pretrain; the base is loaded where it is present and fits."""
    machine = detect_machine(settings, settings.remeasure)
    shape = read_model_shape(settings, machine.device)
    step = make_step(shape, settings, machine)
    loaded_bytes = shape.weight_bytes(step.quantization) + machine.libraries
    loads = shape.has_weights and not settings.compare_methods and fits(loaded_bytes, machine)
    setup = None
    if train_settings is not None and loads:
        setup = set_up_run(train_settings)
        step = make_step(shape, settings, machine, setup.adapter.config)
    rows = _rows(setup) if setup else _rows_without_model(shape, settings)
    load = load_of(rows.train, settings) if rows.train else full_load(shape, settings)
    steps = setup.steps if setup else _steps(settings, rows.train)
    base = {
        "name": settings.base,
        "parameters": shape.parameters,
        "kinds": shape.parameters_by_kind,
    }
    if settings.compare_methods:
        return MethodsPlanResult(
            base=base,
            steps=steps,
            data=rows.about,
            device=machine.device,
            machine_bytes=machine.memory,
            methods=compare(shape, settings, machine, load, steps, rows.held_tokens),
            batch=_batch(load),
            exact=shape.is_exact,
        )
    cost = _cost(settings, step, load, machine, steps, rows.held_tokens)
    level = {"gradient_checkpointing": cost["checkpointing"]["used"]}
    if setup:
        checked = _checked(setup)
        checked["settings"] |= level
        checked["base"] |= {"kinds": shape.parameters_by_kind}
        return PlanResult(**checked, cost=cost)
    used = level | {
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": machine.device,
        "max_steps": steps,
    }
    used |= {"objective": rows.objective, "max_length": rows.max_length} if rows.train else {}
    used |= {"output_dir": str(default_out(train_settings))} if train_settings else {}
    return PlanResult(
        settings=resolved(settings) | _targets(step.count.config) | used,
        base=base,
        data=rows.about,
        steps=steps,
        trainable_parameters=step.count.trainable,
        layers=len(step.count.layers),
        example=rows.example,
        cost=cost,
    )


def _cost(
    settings: PlanSettings,
    step: StepCost,
    load: Workload,
    machine: Machine,
    steps: int | None,
    eval_tokens: int,
) -> dict[str, Any]:
    """Return memory and time of a run, and what fits on the machine."""
    cost = estimate_run(step, load, machine, steps, eval_tokens)
    largest, largest_all = _largest_batches(step, load, machine)
    return (
        cost
        | _about_machine(step.shape, load, machine)
        | {
            "largest_batch_tokens": largest,
            "largest_batch_tokens_all": largest_all,
            "remedies": []
            if cost["fits"] is not False
            else remedies(step.shape, settings, machine, load),
        }
    )


def _largest_batches(
    step: StepCost, load: Workload, machine: Machine
) -> tuple[int | None, int | None]:
    """Return the largest micro-batch in tokens at the chosen checkpointing level, and at "all"."""
    chosen = choose_checkpointing(step, load, machine)[0]
    return (
        largest_batch(chosen, load, machine),
        largest_batch(step.with_checkpointing(1), load, machine),
    )


def _about_machine(shape: ModelShape, load: Workload, machine: Machine) -> dict[str, Any]:
    return {
        "device": machine.device,
        "machine_bytes": machine.memory,
        "batch": _batch(load),
        "exact": shape.is_exact,
    }


def _cost_with_generation(settings: PlanSettings, setup: RunSetup) -> dict[str, Any]:
    """Return memory and time of preference objectives and policies, on the base that is loaded."""
    machine = detect_machine(settings, settings.remeasure)
    shape = read_model_shape(settings, machine.device)
    step, extras = step_with_generation(shape, setup, settings, machine.device)
    load = extras.load
    cost = forecast_answers(step, extras, machine, setup.steps)
    largest, largest_all = _largest_batches(step, load, machine)
    return (
        cost
        | _about_machine(shape, load, machine)
        | {
            "largest_batch_tokens": largest and int(largest * load.attention_ratio),
            "largest_batch_tokens_all": largest_all and int(largest_all * load.attention_ratio),
            "remedies": []
            if cost["fits"] is not False
            else remedies(shape, settings, machine, load, extras.besides),
        }
    )


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
    return _Data(train=list(task.train), held_tokens=sum(len(e.token_ids) for e in task.eval_rows))


def _rows_without_model(shape: ModelShape, settings: PlanSettings) -> _Data:
    """The rows by the tokenizer alone, without a model."""
    if settings.data is None:
        return _Data()
    table = read_table(settings.data, SFT, settings.columns, settings.skip_bad_rows)
    about = {
        "format": table.format,
        "rows": len(table.rows),
        "unused_columns": table.unused_columns,
        "skipped": list(table.skipped),
    }
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
            "unused_columns": prepared.data_info["unused_columns"],
            "skipped": prepared.skipped,
        }
        | {name: prepared.data_info[name] for name in ("rule",) if name in prepared.data_info}
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
        "target_modules": list(
            dict.fromkeys(path.rpartition(".")[2] for path in spec.target_modules)
        ),
        "layers": sorted(blocks),
    }


def _used(setup: RunSetup) -> dict[str, Any]:
    """Return the values of the settings that were automatic, or that imply others."""
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
    """Return the number of parameters of the base, quantized ones included, without adapters."""
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
