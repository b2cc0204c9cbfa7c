"""`afina plan`: what would happen, before it does. Settings, data, one example, the numbers to be learned."""

from pathlib import Path
from typing import Any

from torch import nn

from afina.base.nf4 import NF4Linear
from afina.config import TrainSettings, make_settings, resolved
from afina.delta.attach import frozen_module
from afina.delta.contract import method
from afina.delta.layers import Layer
from afina.delta.targets import block_number
from afina.training.setup import Setup, default_out, set_up


def plan(data: str | Path | TrainSettings, **values: Any) -> dict[str, Any]:
    """The resolved settings, the data's table, a rendered example and the count of trainable parameters.

    Everything that `afina train` checks before its first step is checked here too.
    """
    settings = data if isinstance(data, TrainSettings) else make_settings(TrainSettings, {"data": Path(data), **values})
    setup = set_up(settings)
    prepared, spec = setup.prepared, setup.adapter.spec
    model = prepared.base.model
    counted = {
        path: method("full" if path in spec.modules else spec.method).count(Layer(path, frozen_module(model, path)), spec)
        for path in (*spec.targets, *spec.modules)
    }
    return {
        "settings": resolved(settings) | _used(setup),
        "base": {"name": prepared.base.name, "parameters": parameters(model)},
        "data": {
            "format": prepared.source["format"],
            "objective": prepared.objective,
            "rows": prepared.source["rows"],
            "skipped": prepared.skipped,
        }
        | prepared.counts,
        "steps": setup.steps,
        "trainable_parameters": setup.adapter.count(),
        "layers": len(counted),
        "example": prepared.example,
    }


def _used(setup: Setup) -> dict[str, Any]:
    """What stands in the place of each setting that was left to afina, or that means more than it says."""
    settings, prepared, spec = setup.settings, setup.prepared, setup.adapter.spec
    blocks = {number for path in spec.targets if (number := block_number(path)) is not None}
    return {
        "out": str(default_out(settings)),
        "dtype": str(prepared.base.dtype).removeprefix("torch."),
        "device": prepared.base.device.type,
        "alpha": None if method(spec.method).replaces else spec.alpha,
        "targets": list(dict.fromkeys(path.rpartition(".")[2] for path in spec.targets)),
        "layers": sorted(blocks),
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
