"""Entrywise merge methods: pure functions of dense update matrices `(out, in)` in float32.

    magnitude_prune  keep the entries largest in magnitude, then the weighted sum
    dare_linear      drop entries at random, rescale the others, then the weighted sum
    ties             trim as magnitude_prune; elect a sign per entry; mean of the updates with it
    della            drop at random, small entries of a row more often; then elect as ties

`density` is the ratio of entries kept. At density 1 nothing is dropped: magnitude_prune and
dare_linear are the weighted sum, and ties and della of one adapter are that adapter. Random choices
depend on (seed, adapter, module) and not on the order of the adapters.

References:
    TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2024, arXiv 2311.03099.
    DELLA: Deep et al. 2024, arXiv 2406.11617.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afina.merging.registry import register_merge_method
from afina.settings.combine import DensitySettings, RandomDensitySettings

# DELLA: the drop probabilities of a row's largest and smallest entry differ by this much
WINDOW = 0.2


class WeightedMatrix(NamedTuple):
    """One adapter's update at a module, its weight and its random number generator."""

    matrix: Tensor  # (out, in), float32
    weight: float
    generator: torch.Generator


def random_numbers(seed: int, adapter: str, path: str) -> torch.Generator:
    """Return the random number generator of one adapter at one module."""
    digest = hashlib.sha256(f"{seed} {adapter} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def keep_largest(matrix: Tensor, density: float) -> Tensor:
    """Return the matrix with all but its largest entries set to zero; the ratio `density` stays."""
    keep = max(1, round(density * matrix.numel()))
    if keep == matrix.numel():
        return matrix
    flat = matrix.flatten()
    largest = flat.abs().topk(keep, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view(matrix.shape)


def random_drop(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and divide it by `density` (DARE)."""
    return matrix * (torch.rand(matrix.shape, generator=generator) < density) / density


def magnitude_drop(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep entries with a probability that rises with their rank in the row (DELLA's MagPrune).

    The mean probability is `density`; a kept entry is divided by its own probability. The window
    narrows where a probability would leave the range 0 to 1.
    """
    width = matrix.shape[1]
    window = min(WINDOW, 2 * (1 - density), 1.8 * density)
    order = matrix.abs().argsort(1).argsort(1)  # 0 for the smallest entry of the row
    stay = density + window * (order / max(1, width - 1) - 0.5)
    return matrix * (torch.rand(matrix.shape, generator=generator) < stay) / stay


def elect_sign(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return, per entry, the mean of the weighted updates that have the sign of their sum.

    Zeros are not counted. With all weights equal to l the result is l times the mean of the TIES
    paper (section 4, step 3).
    """
    weighted = torch.stack([weight * matrix for matrix, weight in parts])  # (n, out, in)
    agree = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    return torch.where(agree, weighted, 0.0).sum(0) / agree.sum(0).clamp_min(1)


def _sum(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    total = torch.zeros_like(parts[0][0])
    for matrix, weight in parts:
        total.add_(matrix, alpha=weight)
    return total


@register_merge_method(
    "magnitude_prune", form="entrywise", precision="float32", settings=DensitySettings
)
def magnitude_prune(updates: Sequence[WeightedMatrix], settings: DensitySettings) -> Tensor:
    """Weighted sum of the entries largest in magnitude of each update."""
    return _sum([(keep_largest(u.matrix, settings.density), u.weight) for u in updates])


@register_merge_method(
    "dare_linear",
    form="entrywise",
    precision="float32",
    reference="Yu et al. 2024, arXiv 2311.03099",
    settings=RandomDensitySettings,
)
def dare_linear(updates: Sequence[WeightedMatrix], settings: RandomDensitySettings) -> Tensor:
    """Weighted sum of randomly kept, rescaled entries of each update."""
    density = settings.density
    return _sum([(random_drop(u.matrix, density, u.generator), u.weight) for u in updates])


@register_merge_method(
    "ties",
    form="entrywise",
    precision="float32",
    reference="Yadav et al. 2023, arXiv 2306.01708",
    settings=DensitySettings,
)
def ties(updates: Sequence[WeightedMatrix], settings: DensitySettings) -> Tensor:
    """Mean of the largest entries that agree with the elected sign."""
    return elect_sign([(keep_largest(u.matrix, settings.density), u.weight) for u in updates])


@register_merge_method(
    "della",
    form="entrywise",
    precision="float32",
    reference="Deep et al. 2024, arXiv 2406.11617",
    settings=RandomDensitySettings,
)
def della(updates: Sequence[WeightedMatrix], settings: RandomDensitySettings) -> Tensor:
    """Mean of randomly kept entries, large ones more often, that agree with the elected sign."""
    density = settings.density
    return elect_sign([(magnitude_drop(u.matrix, density, u.generator), u.weight) for u in updates])
