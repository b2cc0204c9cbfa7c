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
    spec = setup.adapter.spec
    tokens = sum(len(example.tokens) for example in setup.train)
    labels = sum(sum(example.labels) for example in setup.train)
    counted = {
        path: method(spec.method).count(Layer(path, frozen_module(setup.base.model, path)), spec) for path in spec.targets
    }
    return {
        "settings": resolved(settings) | {"out": str(default_out(settings)), "learning_rate": setup.learning_rate},
        "base": {
            "name": setup.base.name,
            "parameters": sum(p.numel() for p in _frozen(setup.base.model)),
            "flat": setup.base.flat,
        },
        "data": {
            "format": setup.table.format,
            "objective": setup.objective,
            "rows": len(setup.table.rows),
            "train": len(setup.train),
            "held_out": len(setup.held),
            "skipped": setup.skipped,
            "tokens": tokens,
            "longest": max(len(example.tokens) for example in setup.train),
            "labelled_percent": 100.0 * labels / tokens,
        },
        "steps": setup.steps,
        "trainable_parameters": setup.adapter.count(),
        "layers": len(counted),
        "example": setup.renderer.show(setup.train[0]),
    }


def _frozen(model: Any) -> list[Any]:
    return [p for name, p in model.named_parameters() if ".deltas." not in name]
