"""Merge and restart: ReLoRA (Lialin et al. 2023, arXiv 2307.05695), ReMoRA (arXiv 2405.12130, B).

    step     0 ............ N ............ 2N ............
    adapter  D_1            D_1 + D_2      D_1 + D_2 + D_3     the rank of the sum grows
    trained  D_1            D_2            D_3                 each from zero, moments cleared

The sum of earlier updates is one dense float32 matrix of the adapter (`restart_delta`). The base is
shared and unchanged. On disk it is one more tensor per module, `accumulated.weight`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from afina.adapters.attach import Adapter
from afina.adapters.base import AdapterLayer
from afina.errors import SettingsError


@torch.no_grad()
def merge_and_reset(
    adapter: Adapter, generator: torch.Generator, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Merge the adapter's update into its dense matrices, reset its factors, clear their moments.

    The output is the same before and after. Fully trained modules of the adapter are unchanged.

    Raises:
        SettingsError: the method cannot restart; nothing is changed.
    """
    for delta in _factored(adapter):
        layer = delta.layer
        total = delta.merged_weight(
            torch.zeros(layer.out_features, layer.in_features, device=layer.device)
        )
        delta.reset_parameters(generator)
        delta.restart_delta, delta.restarts = total, delta.restarts + 1
        for parameter in delta.parameters():
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
    _count(adapter, num_restarts(adapter) + 1)


@torch.no_grad()
def check(adapter: Adapter) -> None:
    """Raise the error that `merge_and_reset` would raise; nothing is changed."""
    first = _factored(adapter)[0]
    kept = [parameter.clone() for parameter in first.parameters()]
    first.reset_parameters(torch.Generator())
    for parameter, before in zip(first.parameters(), kept, strict=True):
        parameter.copy_(before)


def num_restarts(adapter: Adapter) -> int:
    """Return how many times the adapter has restarted."""
    return int(adapter.config.method_settings.get("restarts", 0))


def restart_lr_factor(step: int, every: int, steps: int) -> float:
    """Return the learning-rate factor at `step` (0-based): a linear warmup after each restart.

    Args:
        step: The optimizer step.
        every: Steps between restarts.
        steps: Steps of the warmup.
    """
    return 1.0 if step < every else min(1.0, (step % every + 1) / (steps + 1))


def state(adapter: Adapter) -> dict[str, Tensor]:
    """Return what a resumed run needs besides the parameters, by name; empty before a restart."""
    if not num_restarts(adapter):
        return {}
    dense = {
        f"{path}:accumulated": d.restart_delta
        for path, d in adapter.layers.items()
        if d.restart_delta is not None
    }
    return {"restarts": torch.tensor(num_restarts(adapter)), **dense}


def load(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `state` returned."""
    count = int(tensors.get("restarts", torch.tensor(0)))
    if not count:
        return
    for path, delta in adapter.layers.items():
        if delta.is_method and not delta.replaces_base:
            delta.restart_delta, delta.restarts = (
                tensors[f"{path}:accumulated"].to(delta.layer.device),
                count,
            )
    _count(adapter, count)


def _count(adapter: Adapter, count: int) -> None:
    """Set the number of restarts in the configuration, which a file of the adapter records."""
    adapter.config = replace(
        adapter.config, method_settings={**adapter.config.method_settings, "restarts": count}
    )


def _factored(adapter: Adapter) -> list[AdapterLayer]:
    """Return the layers that are no copy of their module, or of rows of it."""
    deltas = [
        delta for delta in adapter.layers.values() if delta.is_method and not delta.replaces_base
    ]
    if not deltas:
        raise SettingsError(
            "a fully fine-tuned adapter has no update to merge and restart", where="restart_steps"
        )
    return deltas
