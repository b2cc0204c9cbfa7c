"""Low-rank arithmetic on updates of one module, and merge methods that use it, in float64.

An update is D = B A, with B `(out, r)` and A `(r, in)`.

    sum        D = [c1 B1, c2 B2, ...] [A1; A2; ...]                       exact: the ranks add up
    svd        B = Qb Rb, A^T = Qa Ra, Rb Ra^T = U S V^T  ->  D = (Qb U) S (Qa V)^T, truncated
    slerp      the sum with the coefficients of the arc between two updates, from
               <B1 A1, B2 A2> = sum of (B1^T B2) * (A1 A2^T)

None of these builds the matrix D `(out, in)`. The truncated D is the best one of its rank in the
Frobenius norm (Eckart and Young); its retained energy is the ratio of ||D||^2 that is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afina.errors import SettingsError
from afina.merging.registry import NoSettings, register_merge_method

# widest matrix that is decomposed in full; wider ones by random projections
MAX_FULL_SVD_WIDTH = 768
# random projections: extra directions and power iterations (Halko et al. 2011, arXiv 0909.4061)
OVERSAMPLE, POWERS = 16, 4
FIRST_DIRECTIONS = 64  # directions computed first where a retained energy decides how many


@dataclass(frozen=True)
class LowRankUpdate:
    """An update as its factors b `(out, r)` and a `(r, in)`, float64."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """Columns of b: an upper bound of the update's rank."""
        return self.a.shape[0]

    def dense(self) -> Tensor:
        """Return D `(out, in)`, float64."""
        return self.b @ self.a


@dataclass(frozen=True)
class TruncatedUpdate:
    """A low-rank approximation and its retained energy, the ratio of the squared norm kept."""

    low: LowRankUpdate
    retained_energy: float


class WeightedUpdate(NamedTuple):
    """One adapter's update at a module and its weight.

    An adapter without the module has an update of rank 0, or none among dense updates.
    """

    update: LowRankUpdate | Tensor  # a matrix (out, in), float64, where the method accepts dense
    weight: float


def concatenate(parts: Sequence[tuple[LowRankUpdate, float]]) -> LowRankUpdate:
    """Return the exact weighted sum; the weights are multiplied into b."""
    return LowRankUpdate(
        torch.cat([weight * low.b for low, weight in parts], 1),
        torch.cat([low.a for low, _ in parts], 0),
    )


def inner(first: LowRankUpdate, second: LowRankUpdate) -> float:
    """Return <D1, D2>, the sum of the products of their entries."""
    return float(((first.b.T @ second.b) * (first.a @ second.a.T)).sum())


def norm(low: LowRankUpdate) -> float:
    """Return the Frobenius norm ||D||."""
    return math.sqrt(max(inner(low, low), 0.0))


def slerp_coefficients(
    first: LowRankUpdate, second: LowRankUpdate, t: float
) -> tuple[float, float]:
    """Return the two coefficients of spherical interpolation at t, from 0 (first) to 1 (second).

    They are sin((1-t) w) / sin w and sin(t w) / sin w, with w the angle between the updates;
    (1-t, t) where the updates are parallel or one is zero.

    References:
        Shoemake 1985, Animating rotation with quaternion curves.
    """
    lengths = norm(first) * norm(second)
    cosine = inner(first, second) / lengths if lengths else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def truncate(
    low: LowRankUpdate, rank: int | None = None, energy: float | None = None
) -> TruncatedUpdate:
    """Return the best approximation of rank `rank`, or of the smallest rank that keeps `energy`.

    Computed from the factors, by two QR decompositions and an SVD of size `(r, r)`.
    """
    qb, rb = torch.linalg.qr(low.b)
    qa, ra = torch.linalg.qr(low.a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    keep = choose_rank(s, float(s.square().sum()), rank, energy)
    return TruncatedUpdate(
        _balanced(qb @ u[:, :keep], s[:keep], (qa @ vh.T[:, :keep]).T),
        _ratio_kept(s, keep, float(s.square().sum())),
    )


def truncate_dense(
    matrix: Tensor, rank: int | None, energy: float | None = None
) -> TruncatedUpdate:
    """Return the best low-rank approximation of a dense update `(out, in)`, float32 or float64.

    A large matrix of which few directions are needed is decomposed by random projections of fixed
    seed, twice as many each time until they keep `energy`; the retained energy is a ratio of the
    exact squared norm.
    """
    total = float(matrix.double().square().sum())
    u, s, vh = _decomposed(matrix, total, rank, energy)
    keep = choose_rank(s, total, rank, energy)
    return TruncatedUpdate(_balanced(u[:, :keep], s[:keep], vh[:keep]), _ratio_kept(s, keep, total))


def _decomposed(
    matrix: Tensor, total: float, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V^T of as many of the largest directions as are needed, or of all."""
    wanted = rank if energy is None else min(FIRST_DIRECTIONS, rank or FIRST_DIRECTIONS)
    while (
        wanted is not None
        and min(matrix.shape) > MAX_FULL_SVD_WIDTH
        and wanted + OVERSAMPLE <= min(matrix.shape) // 3
    ):
        u, s, vh = _project_randomly(matrix, wanted)
        if energy is None or wanted == rank or _ratio_kept(s, wanted, total) >= energy:
            return u, s, vh
        wanted = 2 * wanted if rank is None else min(2 * wanted, rank)
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def _project_randomly(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `(out, n)`, S `(n,)`, V^T `(n, in)` of the largest n = rank + 16 directions."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(
        matrix.shape[1], rank + OVERSAMPLE, generator=generator, dtype=matrix.dtype
    )
    basis = torch.linalg.qr(matrix @ random)[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vh = torch.linalg.svd((basis.T @ matrix).double(), full_matrices=False)
    return basis.double() @ u, s, vh


def choose_rank(s: Tensor, total: float, rank: int | None, energy: float | None) -> int:
    """Return how many singular values to keep: 1 to `rank`, and no more than `energy` needs."""
    keep = len(s) if rank is None else min(rank, len(s))
    if energy is not None and total > 0:
        # 1e-12 less than `energy`: the sum of all of them may round to less than the total
        enough = int((s.square().cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1
        keep = min(keep, enough)
    return max(keep, 1)


def _ratio_kept(s: Tensor, keep: int, total: float) -> float:
    return min(1.0, float(s[:keep].square().sum()) / total) if total > 0 else 1.0


def _balanced(u: Tensor, s: Tensor, vh: Tensor) -> LowRankUpdate:
    """Split each singular value evenly, so that both factors have similar magnitude in float32."""
    root = s.sqrt()
    return LowRankUpdate(u * root, root[:, None] * vh)


@register_merge_method(
    "sum", form="low_rank", precision="float64", truncation="never", composes=True
)
def weighted_sum(updates: Sequence[WeightedUpdate], settings: NoSettings) -> LowRankUpdate:
    """Exact weighted sum, as one lora or, of other methods, as a composition."""
    return concatenate(
        [(u.update, u.weight) for u in updates if isinstance(u.update, LowRankUpdate)]
    )


@register_merge_method(
    "svd",
    form="low_rank",
    precision="float64",
    reference="Eckart and Young 1936",
    truncation="always",
    accepts_dense=True,
)
def svd(updates: Sequence[WeightedUpdate], settings: NoSettings) -> LowRankUpdate | Tensor:
    """Best lora of a rank for the exact weighted sum, by singular value decomposition."""
    matrices = [u.weight * u.update for u in updates if isinstance(u.update, Tensor)]
    return torch.stack(matrices).sum(0) if matrices else weighted_sum(updates, settings)


@register_merge_method("slerp", form="low_rank", precision="float64", reference="Shoemake 1985")
def slerp(updates: Sequence[WeightedUpdate], settings: NoSettings) -> LowRankUpdate:
    """Spherical interpolation of two loras, module by module, at t = w2 / (w1 + w2)."""
    if len(updates) > 2 or any(u.weight < 0 for u in updates):
        raise SettingsError(
            "slerp combines two adapters with positive weights",
            where="adapters",
            why=f"given: {len(updates)} adapters, weights {[u.weight for u in updates]}",
            hint="--merge-method svd",
        )
    total = sum(u.weight for u in updates)
    parts = [u.update for u in updates if isinstance(u.update, LowRankUpdate)]
    coefficients = [u.weight / total for u in updates]
    if all(part.rank for part in parts) and len(parts) == 2:  # rank 0: no direction to rotate from
        first, second = parts
        coefficients = list(slerp_coefficients(first, second, coefficients[1]))
    return concatenate(list(zip(parts, coefficients, strict=True)))
