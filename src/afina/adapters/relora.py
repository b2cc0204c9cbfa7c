"""Merge and restart during training: ReLoRA (Lialin et al. 2023, arXiv 2307.05695) and ReMoRA (arXiv 2405.12130, app. B).

    step     0 ............ N ............ 2N ............
    adapter  D_1            D_1 + D_2      D_1 + D_2 + D_3       the rank of the sum grows
    trained  D_1            D_2            D_3                   each from zero, the optimizer without memory

What was learned goes into one dense matrix of that run, held by the adapter (`accumulated`, float32). The base is
shared, and is not touched. On disk it is one more tensor a layer, `accumulated.weight`.
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
    """Take what `adapter` has learned into its dense deltas, begin its factors anew, and clear their moments.

    The output is the same before and after. Whole modules that the adapter owns go on as they are. Raises
    `SettingsError`, having changed nothing, where the method cannot restart.
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
    """Raise the error that `restart` would raise, before a run begins; changes nothing."""
    first = _factored(adapter)[0]
    kept = [parameter.clone() for parameter in first.parameters()]
    first.reset_parameters(torch.Generator())
    for parameter, before in zip(first.parameters(), kept, strict=True):
        parameter.copy_(before)


def num_restarts(adapter: Adapter) -> int:
    """How many times the adapter has restarted."""
    return int(adapter.config.method_settings.get("restarts", 0))


def restart_lr_factor(step: int, every: int, steps: int) -> float:
    """Factor of the learning rate at `step` (0-based): after each restart, a linear rise over `steps` steps."""
    return 1.0 if step < every else min(1.0, (step % every + 1) / (steps + 1))


def state(adapter: Adapter) -> dict[str, Tensor]:
    """What a resumed run needs besides the parameters, by name; empty where there was no restart."""
    if not num_restarts(adapter):
        return {}
    dense = {
        f"{path}:accumulated": d.restart_delta
        for path, d in adapter.layers.items()
        if d.restart_delta is not None
    }
    return {"restarts": torch.tensor(num_restarts(adapter)), **dense}


def load(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `state` gave."""
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
    """Restarts are part of what the adapter is: a file of it says what its factors mean now."""
    adapter.config = replace(
        adapter.config, method_settings={**adapter.config.method_settings, "restarts": count}
    )


def _factored(adapter: Adapter) -> list[AdapterLayer]:
    """The deltas that are more than a copy of their module, or of rows of it."""
    deltas = [
        delta for delta in adapter.layers.values() if delta.is_method and not delta.replaces_base
    ]
    if not deltas:
        raise SettingsError(
            "a fully fine-tuned adapter has nothing to merge and restart", where="restart_every"
        )
    return deltas
