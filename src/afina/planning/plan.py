"""`afina plan`: settings, data, one example, trainable parameters, memory and time before a run.

The base is loaded where it is present and fits, so that everything is checked that `afina train`
checks before its first step. Otherwise its configuration is enough: a 70B model can be planned on a
laptop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from afina.adapters.coverage import count_base_parameters, target_coverage
from afina.adapters.registry import get_method
from afina.adapters.target_selection import layer_index
from afina.data.packing import BatchSampler
from afina.data.schemas import SFT
from afina.data.several_files import describe_files
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.loading import load_tokenizer
from afina.models.parameters import describe_unquantized
from afina.objectives.language_data import read_examples
from afina.objectives.prepared import ShownExample, row_length, show_example, text_renderer
from afina.objectives.registry import get_objective
from afina.objectives.run_rows import read_files
from afina.objectives.workload import StepWorkload, packed_workload
from afina.planning.checkpointing_policy import choose_level
from afina.planning.estimate import estimate_methods, estimate_run, largest_batch, remedies
from afina.planning.estimates import Workload
from afina.planning.machine import Machine, detect_machine
from afina.planning.model_shape import ModelShape, read_model_shape
from afina.planning.results import MethodsPlanResult, PlanResult
from afina.planning.run_step import full_load, make_step, run_step
from afina.planning.step_cost import StepCost
from afina.planning.trial import trial_cost
from afina.settings import PlanSettings, TrainSettings, make_settings, resolved
from afina.training.setup.prepare import AUTO_TEXT, resolve_objective
from afina.training.setup.set_up import RunSetup, default_out, run_length, set_up_run

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
DEFAULT_SHOWN = 3  # longest examples that a plan prints, where --show is not given
UNKNOWN_WORKLOAD = StepWorkload(())  # full batches, and nothing in addition


@dataclass
class _Rows:
    """Facts of the rows, counted by the tokenizer alone; unknown without rows or tokenizer."""

    about: dict[str, Any] = field(default_factory=dict)
    example: str | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)
    used: dict[str, Any] = field(default_factory=dict)  # settings that the rows determine
    workload: StepWorkload = UNKNOWN_WORKLOAD
    steps: int | None = None


def plan(
    data: str | Path | Sequence[str | Mapping[str, Any]] | TrainSettings | None = None,
    **values: Any,
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
        given = {} if data is None else {"data": data}
        settings = make_settings(PlanSettings, given | values)
    train_settings = _train_settings(settings)
    _check_show(settings)
    objective = settings.objective
    if train_settings is not None:
        objective = resolve_objective(train_settings)
    if get_objective(AUTO_TEXT if objective == "auto" else objective).planned_by_tokens:
        return _plan_by_tokens(settings, train_settings)
    return _plan_with_rows(settings, train_settings, objective)


def _machine(settings: PlanSettings) -> Machine:
    """Return this machine, with the memory that is planned for."""
    machine = detect_machine(settings, settings.remeasure)
    given = settings.memory_gb
    return machine if given is None else replace(machine, memory=1e9 * given)


def _check_show(settings: PlanSettings) -> None:
    """Raise `SettingsError` where examples are requested and none are read."""
    name = next((n for n in ("show", "show_longest") if getattr(settings, n)), None)
    if name is not None and (settings.data is None or settings.compare_methods):
        why = "there are no rows" if settings.data is None else "compare_methods is a table"
        hint = "afina plan DATA" if settings.data is None else "leave compare_methods out"
        raise SettingsError(f"{name} has no effect here", where=name, why=why, hint=hint)


def _select_examples(
    settings: PlanSettings, rows: Sequence[Any], show: Callable[[Any], ShownExample]
) -> list[dict[str, Any]]:
    """Return the examples to print: some spread over the rows, then the longest ones."""
    wanted = settings.show or 0
    spread = [rows[n * len(rows) // wanted] for n in range(wanted)] if wanted < len(rows) else rows
    chosen = [asdict(show(row)) for row in spread[:wanted]]
    if settings.show_longest:
        longest = sorted(rows, key=row_length, reverse=True)[: settings.show or DEFAULT_SHOWN]
        chosen += [asdict(show(row)) | {"is_longest": True} for row in longest]
    return chosen


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
    workload = setup.prepared.task.step_workload()
    if workload is None:
        return PlanResult(**_checked(setup, settings), cost=None)
    machine = _machine(settings)
    if setup.prepared.task.planned_by_trial:
        return _checked_plan(setup, settings, trial_cost(setup, workload, machine))
    shape = read_model_shape(settings, machine.device)
    step = run_step(shape, setup, workload, machine.device)
    return _checked_plan(setup, settings, _cost(settings, step, workload, machine, setup.steps))


def _plan_by_tokens(
    settings: PlanSettings, train_settings: TrainSettings | None
) -> PlanResult | MethodsPlanResult:
    """Return the plan of sft or pretrain; the base is loaded where it is present and fits."""
    machine = _machine(settings)
    shape = read_model_shape(settings, machine.device)
    step = make_step(shape, settings, machine.device)
    loaded_bytes = shape.weight_bytes(step.quantization) + machine.libraries
    loads = shape.has_weights and not settings.compare_methods and machine.fits(loaded_bytes)
    if train_settings is not None and loads:
        return _plan_loaded(settings, set_up_run(train_settings), shape, machine)
    rows = _rows_without_model(shape, settings)
    base = {
        "name": settings.base,
        "parameters": shape.parameters,
        **_parts_of_base(shape, step),
    }
    if settings.compare_methods:
        load = _load(shape, settings, rows.workload)
        return MethodsPlanResult(
            base=base,
            steps=rows.steps,
            data=rows.about,
            device=machine.device,
            machine_bytes=machine.memory,
            methods=estimate_methods(shape, settings, machine, load, rows.workload, rows.steps),
            batch=_batch(load),
            exact=shape.is_exact,
        )
    cost = _cost(settings, step, rows.workload, machine, rows.steps)
    used = rows.used | {
        "gradient_checkpointing": cost["checkpointing"]["used"],
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": machine.device,
        "max_steps": rows.steps,
    }
    used |= {"output_dir": str(default_out(train_settings))} if train_settings else {}
    return PlanResult(
        settings=resolved(settings) | _targets(step.count.config) | used,
        base=base | target_coverage(shape.model, step.count.config).to_dict(),
        data=rows.about,
        steps=rows.steps,
        trainable_parameters=step.count.trainable,
        layers=len(step.count.layers),
        example=rows.example,
        examples=rows.examples,
        cost=cost,
    )


def _plan_loaded(
    settings: PlanSettings, setup: RunSetup, shape: ModelShape, machine: Machine
) -> PlanResult:
    """Return the plan of a run that is set up on its base, with the base's parameters by kind."""
    workload = setup.prepared.task.step_workload()
    step = run_step(shape, setup, workload, machine.device)
    cost = _cost(settings, step, workload or UNKNOWN_WORKLOAD, machine, setup.steps)
    return _checked_plan(setup, settings, cost, **_parts_of_base(shape, step))


def _parts_of_base(shape: ModelShape, step: StepCost) -> dict[str, Any]:
    """Return the base's parameters by kind, and which are not in 4 bits on a 4-bit base."""
    kinds = {"kinds": shape.parameters_by_kind}
    if step.quantization != "nf4":
        return kinds
    paths = [one.path for one in shape.quantized_weights("nf4")]
    return kinds | {"unquantized": describe_unquantized(shape.model, paths)}


def _checked_plan(
    setup: RunSetup, settings: PlanSettings, cost: dict[str, Any], **about_base: Any
) -> PlanResult:
    checked = _checked(setup, settings)
    checked["settings"] |= {"gradient_checkpointing": cost["checkpointing"]["used"]}
    checked["base"] |= about_base
    return PlanResult(**checked, cost=cost)


def _load(shape: ModelShape, settings: PlanSettings, workload: StepWorkload) -> Workload:
    """Return the sizes of the passes; those of full batches where the rows are not known."""
    return Workload.of(workload) if workload.passes else full_load(shape, settings)


def _cost(
    settings: PlanSettings,
    step: StepCost,
    workload: StepWorkload,
    machine: Machine,
    steps: int | None,
) -> dict[str, Any]:
    """Return memory and time of a run, and what fits on the machine."""
    shape, load = step.shape, _load(step.shape, settings, workload)
    cost = estimate_run(step, load, workload, machine, steps)
    chosen = choose_level(step, load, machine)[0]
    ratio = load.attention_ratio  # batches are set in tokens of sequences, prefixes included
    largest, largest_all = (
        tokens and int(tokens * ratio)
        for tokens in (
            largest_batch(chosen, load, machine),
            largest_batch(step.with_checkpointing(1), load, machine),
        )
    )
    is_short = cost["fits"] is False
    changes = remedies(shape, settings, machine, load, step.extra_bytes) if is_short else []
    return cost | {
        "device": machine.device,
        "machine_bytes": machine.memory,
        "batch": _batch(load),
        "exact": shape.is_exact,
        "largest_batch_tokens": largest,
        "largest_batch_tokens_all": largest_all,
        "remedies": changes,
    }


def _batch(load: Workload) -> dict[str, Any]:
    return {
        "tokens": load.tokens,
        "labels": load.labels,
        "longest": load.max_length,
        "passes": load.num_micro_batches,
    }


def _rows_without_model(shape: ModelShape, settings: PlanSettings) -> _Rows:
    """Return the facts of the rows by the tokenizer alone, without a model."""
    if settings.data is None:
        return _Rows(steps=settings.max_steps)
    table = read_files(settings, SFT)
    about = {
        "format": table.format,
        "rows": len(table.rows),
        "unused_columns": table.unused_columns,
        "skipped": list(table.skipped),
    }
    if not any((shape.folder / name).is_file() for name in TOKENIZERS):
        if settings.show or settings.show_longest:
            hint = "load its tokenizer into that folder, or leave --show out"
            raise SettingsError("examples need a tokenizer", where=str(shape.folder), hint=hint)
        return _Rows(about, steps=settings.max_steps)
    tokenizer = load_tokenizer(shape.folder, settings.base, settings.trust_remote_code)
    renderer = text_renderer(settings, tokenizer, shape.max_positions)
    read = read_examples(settings, table, renderer)
    sampler = BatchSampler(
        read.train,
        settings.max_tokens_per_batch,
        settings.gradient_accumulation_steps,
        settings.seed,
    )
    objective = get_objective(read.objective)
    return _Rows(
        about={**about, "objective": read.objective, "skipped": read.skipped}
        | ({"files": describe_files(read.train, table.files, row_length)} if table.files else {})
        | read.counts,
        example=read.renderer.format_loss_mask(read.train[0]),
        examples=_select_examples(settings, read.train, partial(show_example, read.renderer)),
        used={"objective": read.objective, "max_length": read.renderer.max_length},
        workload=packed_workload(sampler, read.eval_examples),
        steps=run_length(settings, objective, sampler.steps_per_epoch),
    )


def _checked(setup: RunSetup, settings: PlanSettings) -> dict[str, Any]:
    """Return settings, base, data and adapter of a run that is set up."""
    prepared, spec = setup.prepared, setup.adapter.config
    return {
        "settings": resolved(setup.settings) | _used(setup),
        "base": {
            "name": prepared.base.name,
            "parameters": count_base_parameters(prepared.base.model),
            **target_coverage(prepared.base.model, spec).to_dict(),
        },
        "data": {
            "format": prepared.data_info["format"],
            "objective": prepared.objective,
            "rows": prepared.data_info["rows"],
            "unused_columns": prepared.data_info["unused_columns"],
            "skipped": prepared.skipped,
        }
        | {name: value for name, value in prepared.data_info.items() if name in ("rule", "files")}
        | prepared.counts,
        "steps": setup.steps,
        "trainable_parameters": setup.adapter.num_parameters(),
        "layers": len({*spec.target_modules, *spec.modules_to_save}),
        "example": prepared.example,
        "examples": _select_examples(settings, prepared.task.train, prepared.show),
    }


def _targets(spec: AdapterConfig) -> dict[str, Any]:
    """Return the values of the settings that choose modules and layers."""
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
