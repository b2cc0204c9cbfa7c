"""`--target-modules auto`: modules and their ranks, from the gradients of a few batches.

The loss initially decreases along the gradient G = dL/dW (out, in). An adapter of rank r follows at
most r of its singular directions, which contain the energy sum of sigma_i^2, i <= r (Eckart and
Young). One rank of a module costs in + out parameters. So the next rank goes where
sigma^2 / (in + out) is largest, until the budget is spent: since sigma decreases, that is the best
allocation up to the last rank, which may not fit. G is the mean over the batches, so that their
noise cancels.

References:
    LoRA-GA (arXiv 2407.05000) and EVA (arXiv 2410.07170) initialize by such decompositions.
"""

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from afina.adapters.attach import attach, detach
from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
from afina.adapters.target_module import TargetModule
from afina.adapters.target_selection import resolve_target_modules
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.causal_lm import CausalLM
from afina.objectives.prepared import PreparedData
from afina.settings import TrainSettings

NUM_GRADIENT_STEPS = 4  # optimizer steps whose rows are used


def gradient_spectra(prepared: PreparedData, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return the squared singular values, decreasing, of each module's mean gradient.

    The gradient is that of the first batches; values are float32, on the CPU.

    Raises:
        SettingsError: The base is in 4 bits: its codes have no gradient.
    """
    base = prepared.base
    if isinstance(base, CausalLM) and base.quantization != "none":
        why = "it uses the gradient of the weights, and 4-bit codes have none"
        raise SettingsError(
            "target_modules auto needs a base that is not quantized",
            where="target_modules",
            why=why,
            hint="--target-modules all-linear",
        )
    adapter = attach(
        base.model, base.forward_context, "energy", AdapterConfig("full", tuple(paths)), 0
    )
    try:
        adapter.train(True)
        for step in range(min(NUM_GRADIENT_STEPS, prepared.task.steps_per_epoch)):
            for batch in prepared.task.step_batches(step):
                loss = prepared.task.loss(batch, adapter.active)
                (loss / prepared.task.num_targets(batch)).backward()
        found = {}
        for path, layer in adapter.layers.items():
            matrix = next(p for p in layer.parameters() if p.ndim > 1)
            assert matrix.grad is not None
            found[path] = torch.linalg.svdvals(matrix.grad.float().flatten(1)).square().cpu()
            matrix.grad = None
        return found
    finally:
        detach(base.model, adapter)


def allocate_ranks(
    energies: Mapping[str, Tensor], prices: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return the rank of each module that has one, in their order.

    Args:
        energies: Squared singular values by module, decreasing.
        prices: Trainable parameters of one rank by module.
        budget: Trainable parameters in all.

    Raises:
        SettingsError: The budget is less than any single rank costs.
    """
    queue = [
        (-float(values[0]) / prices[path], path) for path, values in energies.items() if len(values)
    ]
    heapq.heapify(queue)
    ranks = dict.fromkeys(energies, 0)
    while queue:
        _, path = heapq.heappop(queue)
        if prices[path] > budget:
            continue  # a cheaper module may still fit
        budget -= prices[path]
        ranks[path] += 1
        if ranks[path] < len(energies[path]):
            heapq.heappush(queue, (-float(energies[path][ranks[path]]) / prices[path], path))
    chosen = {path: rank for path, rank in ranks.items() if rank}
    if not chosen:
        raise SettingsError(
            f"a budget of {budget:,} parameters is too small for a single rank",
            where="parameter_budget",
            hint=f"one costs from {min(prices.values()):,}",
        )
    return chosen


def resolve_auto_targets(settings: TrainSettings, prepared: PreparedData) -> TrainSettings:
    """Return the settings with modules and ranks instead of "auto".

    The budget is `parameter_budget`, or the parameters of all linear modules at `rank`.
    """
    if get_method(get_preset(settings.method, 1).method).replaces_base:
        raise SettingsError(
            "only methods with a rank choose it",
            where="target_modules",
            hint="--target-modules all-linear",
        )
    model = prepared.base.model
    paths = [
        path
        for path in resolve_target_modules(model, "all-linear", settings.layers, False)
        if path not in prepared.modules_to_save
    ]
    layers = {path: TargetModule(path, model.get_submodule(path)) for path in paths}
    prices = {path: layer.in_features + layer.out_features for path, layer in layers.items()}
    budget = settings.parameter_budget or settings.rank * sum(prices.values())
    ranks = allocate_ranks(gradient_spectra(prepared, paths), prices, budget)
    return settings.model_copy(
        update={"target_modules": list(ranks), "rank_pattern": ranks, "layers": None}
    )
