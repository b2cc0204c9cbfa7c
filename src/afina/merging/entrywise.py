"""Methods that look at single entries of the updates: pure functions of dense matrices (out, in), float32.

    magnitude   keep the largest entries of each, then the weighted sum
    dare        drop entries at random, enlarge the others to keep the mean, then the weighted sum   (Yu et al. 2311.03099)
    ties        trim as magnitude; at each entry the sign with more weight wins; mean of those that agree
                                                                                             (Yadav et al. 2306.01708)
    della       drop at random, small entries of a row more often; then elect and average as ties   (Deep et al. 2406.11617)

`density` is the share of entries kept. At density 1 nothing is dropped: magnitude and dare are the plain weighted sum,
and ties and della of one adapter are that adapter. Random choices depend on (seed, adapter, layer) alone, not on the order.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WINDOW = 0.2  # della: the largest and the smallest entry of a row differ by this much in their chance of being dropped

Weighted = Sequence[tuple[Tensor, float, torch.Generator]]  # update, weight, its random numbers


def random_numbers(seed: int, adapter: str, path: str) -> torch.Generator:
    """The random numbers for one adapter at one layer."""
    digest = hashlib.sha256(f"{seed} {adapter} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def keep_largest(matrix: Tensor, density: float) -> Tensor:
    """The matrix with all but its largest entries set to zero; `density` of them stay."""
    keep = max(1, round(density * matrix.numel()))
    if keep == matrix.numel():
        return matrix
    flat = matrix.flatten()
    largest = flat.abs().topk(keep, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view(matrix.shape)


def random_drop(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: each entry stays with chance `density`, divided by it."""
    return matrix * (torch.rand(matrix.shape, generator=generator) < density) / density


def magnitude_drop(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DELLA's MagPrune: within a row the chance of staying rises with an entry's rank, `density` on average.

    What stays is divided by its own chance. The window narrows where it would lead out of 0..1.
    """
    width = matrix.shape[1]
    window = min(WINDOW, 2 * (1 - density), 1.8 * density)
    order = matrix.abs().argsort(1).argsort(1)  # 0 for the smallest entry of the row
    stay = density + window * (order / max(1, width - 1) - 0.5)
    return matrix * (torch.rand(matrix.shape, generator=generator) < stay) / stay


def elect_sign(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """At each entry the mean of the weighted updates that have the sign of their sum; zeros are no votes.

    With all weights equal to l this is l times the mean of the paper (section 4, step 3).
    """
    weighted = torch.stack([weight * matrix for matrix, weight in parts])  # (n, out, in)
    agree = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    return torch.where(agree, weighted, 0.0).sum(0) / agree.sum(0).clamp_min(1)


def _sum(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    total = torch.zeros_like(parts[0][0])
    for matrix, weight in parts:
        total.add_(matrix, alpha=weight)
    return total


def magnitude(parts: Weighted, density: float) -> Tensor:
    """Largest entries of each, summed: (out, in)."""
    return _sum([(keep_largest(matrix, density), weight) for matrix, weight, _ in parts])


def dare(parts: Weighted, density: float) -> Tensor:
    """Random entries of each, enlarged, summed: (out, in)."""
    return _sum(
        [(random_drop(matrix, density, generator), weight) for matrix, weight, generator in parts]
    )


def ties(parts: Weighted, density: float) -> Tensor:
    """Trim, elect, average: (out, in)."""
    return elect_sign([(keep_largest(matrix, density), weight) for matrix, weight, _ in parts])


def della(parts: Weighted, density: float) -> Tensor:
    """Drop by size, elect, average: (out, in)."""
    return elect_sign(
        [
            (magnitude_drop(matrix, density, generator), weight)
            for matrix, weight, generator in parts
        ]
    )


METHODS: dict[str, Callable[[Weighted, float], Tensor]] = {
    "ties": ties,
    "dare": dare,
    "magnitude": magnitude,
    "della": della,
}
