"""`afina plan`: what would happen, before it does. Settings, data, one example, the numbers to be learned."""

from pathlib import Path
from typing import Any

from afina.config import TrainSettings, make_settings, resolved
from afina.delta.attach import frozen_module
from afina.delta.contract import method
from afina.delta.layers import Layer
from afina.training.setup import default_out, set_up


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
        "settings": resolved(settings) | {"out": str(default_out(settings)), "learning_rate": setup.learning_rate},
        "base": {"name": prepared.base.name, "parameters": sum(p.numel() for p in _frozen(model))},
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


def _frozen(model: Any) -> list[Any]:
    return [p for name, p in model.named_parameters() if ".deltas." not in name]
