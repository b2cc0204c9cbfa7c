"""`afina plan`: what would happen, before it does. Settings, data, one example, numbers to learn, memory and time.

The base is loaded where it is there and fits, so that everything is checked that `afina train` checks before its first
step. Else its configuration is enough: a model of 70B can be asked about on a laptop.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from afina.base.load import load_tokenizer
from afina.base.nf4 import NF4Linear
from afina.config import POLICIES, PREFERENCES, PlanSettings, TrainSettings, make_settings, resolved
from afina.data.batches import Sampler
from afina.data.formats import read_table
from afina.data.template import Example
from afina.delta.contract import Spec, method
from afina.delta.targets import block_number
from afina.errors import SettingsError
from afina.objective.language import LanguageTask
from afina.planning.answers import forecast_answers, step_of
from afina.planning.figures import Load
from afina.planning.forecast import (
    compare,
    find_place,
    fits,
    forecast,
    full_load,
    largest_batch,
    load_of,
    make_step,
    remedies,
    turn,
)
from afina.planning.shape import Shape, read_shape
from afina.training.prepare import objective_of, read_examples
from afina.training.setup import Setup, default_out, set_up

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
        settings = make_settings(PlanSettings, ({} if data is None else {"data": Path(data)}) | values)
    told = {name: getattr(settings, name) for name in settings.model_fields_set if name in TrainSettings.model_fields}
    asked = None if settings.data is None else TrainSettings(**told)
    objective = settings.objective if asked is None else objective_of(asked)
    if objective in ("classify", "mlm", *PREFERENCES, *POLICIES):
        if asked is None or settings.compare:
            where = "data" if asked is None else "compare"
            why = "what a step of it takes depends on the rows, and on a base that is here"
            raise SettingsError(f"{objective} is planned with its rows, one method at a time", where=where, why=why)
        answering = set_up(asked)
        cost = None if objective in ("classify", "mlm") else _cost_of_answers(settings, answering)
        checked = _checked(answering)
        if cost is not None:
            checked["settings"] |= {"checkpointing": cost["checkpointing"]["used"]}
        return checked | {"cost": cost}
    place = find_place(settings, settings.probe)
    shape = read_shape(settings, place.device)
    step = make_step(shape, settings, place)
    weights = shape.weight_bytes(step.storage) + place.libraries
    setup = None
    if asked is not None and shape.has_weights and fits(weights, place) and not settings.compare:
        setup = set_up(asked)
        step = make_step(shape, settings, place, setup.adapter.spec)
    rows = _rows(setup) if setup else _rows_alone(shape, settings)
    load = load_of(rows.train, settings) if rows.train else full_load(shape, settings)
    steps = setup.steps if setup else _steps(settings, rows.train)
    about = {"base": {"name": settings.base, "parameters": shape.parameters, "kinds": shape.kinds}, "steps": steps}
    if settings.compare:
        lines = compare(shape, settings, place, load, steps, rows.held_tokens)
        return about | {"data": rows.about, "device": place.device, "machine_bytes": place.memory, "methods": lines,
                        "batch": _batch(load), "exact": shape.exact}  # fmt: skip
    cost = forecast(step, load, place, steps, rows.held_tokens)
    cost |= {
        "device": place.device, "machine_bytes": place.memory, "batch": _batch(load), "exact": shape.exact,
        "largest_batch_tokens": largest_batch(turn(step, load, place)[0], load, place),
        "largest_batch_tokens_all": largest_batch(step.turned(1), load, place),
        "remedies": remedies(shape, settings, place, load) if cost["fits"] is False else [],
    }  # fmt: skip
    dial = {"checkpointing": cost["checkpointing"]["used"]}
    if setup:
        checked = _checked(setup)
        checked["settings"] |= dial
        return checked | {"base": checked["base"] | {"kinds": shape.kinds}, "cost": cost}
    used = dial | {"dtype": str(shape.dtype).removeprefix("torch."), "device": place.device, "steps": steps}
    used |= {"objective": rows.objective, "max_length": rows.max_length} if rows.train else {}
    used |= {"out": str(default_out(asked))} if asked else {}
    return about | {
        "settings": resolved(settings) | _targets(step.count.spec) | used,
        "data": rows.about,
        "trainable_parameters": step.count.trainable,
        "layers": len(step.count.layers),
        "example": rows.example,
        "cost": cost,
    }


def _cost_of_answers(settings: PlanSettings, setup: Setup) -> dict[str, Any]:
    """What preferences and rewards take, on the base that is loaded."""
    place = find_place(settings, settings.probe)
    shape = read_shape(settings, place.device)
    step, answers = step_of(shape, setup, settings, place.device)
    load = answers.load
    cost = forecast_answers(step, answers, place, setup.steps)
    most = [largest_batch(one, load, place) for one in (turn(step, load, place)[0], step.turned(1))]
    return cost | {
        "device": place.device, "machine_bytes": place.memory, "batch": _batch(load), "exact": shape.exact,
        "largest_batch_tokens": most[0] and int(most[0] * load.read),
        "largest_batch_tokens_all": most[1] and int(most[1] * load.read),
        "remedies": remedies(shape, settings, place, load, answers.besides) if cost["fits"] is False else [],
    }  # fmt: skip


def _batch(load: Load) -> dict[str, Any]:
    return {"tokens": load.tokens, "labels": load.labels, "longest": load.length, "passes": load.passes}


def _steps(settings: PlanSettings, train: list[Example]) -> int | None:
    """Optimizer steps of a run, where rows or settings tell."""
    if settings.steps is not None or not train:
        return settings.steps
    each = Sampler(train, settings.batch_tokens, settings.accumulate, settings.seed).steps_per_epoch
    return max(1, round(settings.epochs * each))


def _rows(setup: Setup) -> _Data:
    """The rows of a run that is set up."""
    task = setup.prepared.task
    assert isinstance(task, LanguageTask)
    return _Data(train=task.train, held_tokens=sum(len(e.tokens) for e in task.held))


def _rows_alone(shape: Shape, settings: PlanSettings) -> _Data:
    """The rows by the tokenizer alone, without a model."""
    if settings.data is None:
        return _Data()
    table = read_table(settings.data, settings.columns, settings.skip_bad_rows)
    about = {"format": table.format, "rows": len(table.rows), "skipped": list(table.skipped)}
    if not any((shape.folder / name).is_file() for name in TOKENIZERS):
        return _Data(about)
    tokenizer = load_tokenizer(shape.folder, settings.base, settings.trust_remote_code)
    made = read_examples(settings, table, tokenizer, shape.context)
    return _Data(
        about={**about, "objective": made.objective, "skipped": made.skipped} | made.counts,
        example=made.renderer.show(made.train[0]),
        objective=made.objective,
        max_length=made.renderer.max_length,
        train=made.train,
        held_tokens=sum(len(e.tokens) for e in made.held),
    )


def _checked(setup: Setup) -> dict[str, Any]:
    """What a run that is set up would be."""
    prepared, spec = setup.prepared, setup.adapter.spec
    return {
        "settings": resolved(setup.settings) | _used(setup),
        "base": {"name": prepared.base.name, "parameters": parameters(prepared.base.model)},
        "data": {
            "format": prepared.source["format"],
            "objective": prepared.objective,
            "rows": prepared.source["rows"],
            "skipped": prepared.skipped,
        }
        | prepared.counts,
        "steps": setup.steps,
        "trainable_parameters": setup.adapter.count(),
        "layers": len({*spec.targets, *spec.modules}),
        "example": prepared.example,
    }


def _targets(spec: Spec) -> dict[str, Any]:
    """What stands for the settings that choose layers."""
    blocks = {number for path in spec.targets if (number := block_number(path)) is not None}
    return {
        "alpha": None if method(spec.method).replaces else spec.alpha,
        "targets": list(dict.fromkeys(path.rpartition(".")[2] for path in spec.targets)),
        "layers": sorted(blocks),
    }


def _used(setup: Setup) -> dict[str, Any]:
    """What stands in the place of each setting that was left to afina, or that means more than it says."""
    settings, prepared = setup.settings, setup.prepared
    return _targets(setup.adapter.spec) | {
        "out": str(default_out(settings)),
        "dtype": str(prepared.base.dtype).removeprefix("torch."),
        "device": prepared.base.device.type,
        "objective": prepared.objective,
        "max_length": prepared.max_length,
        "steps": setup.steps,
        "epochs": round(setup.steps / prepared.task.steps_per_epoch, 2),
        "learning_rate": setup.learning_rate,
        "check_every": setup.check_every,
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
