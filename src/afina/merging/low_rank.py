"""Low-rank arithmetic on updates of one layer: D = B A, with B (out, r) and A (r, in), in float64.

    sum        D = [c1 B1, c2 B2, ...] [A1; A2; ...]                         exact: the ranks add up
    svd        B = Qb Rb, A^T = Qa Ra, Rb Ra^T = U S V^T  ->  D = (Qb U) S (Qa V)^T, cut after the largest values
    angle      <B1 A1, B2 A2> = sum of (B1^T B2) * (A1 A2^T)

None of these builds the matrix D (out, in). By Eckart and Young the cut D is the best one of its rank in the Frobenius
norm; its energy is the share of ||D||^2 that is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 768  # up to this width a dense matrix is decomposed whole; beyond, by random products
OVERSAMPLE, POWERS = (
    16,
    4,
)  # of the random products: Halko, Martinsson and Tropp 2011, arXiv 0909.4061
FIRST = 64  # directions looked for first where an energy says how many are needed


@dataclass(frozen=True)
class LowRankUpdate:
    """An update as two thin matrices: b (out, r), a (r, in), float64."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """Columns of b; the update's own rank is this or less."""
        return self.a.shape[0]

    def dense(self) -> Tensor:
        """D (out, in), float64."""
        return self.b @ self.a


@dataclass(frozen=True)
class TruncatedUpdate:
    """A low-rank approximation, and the share of the squared norm that it keeps."""

    low: LowRankUpdate
    retained_energy: float


def concatenate(parts: Sequence[tuple[LowRankUpdate, float]]) -> LowRankUpdate:
    """The exact weighted sum; the weights go into b, once."""
    return LowRankUpdate(
        torch.cat([weight * low.b for low, weight in parts], 1),
        torch.cat([low.a for low, _ in parts], 0),
    )


def inner(first: LowRankUpdate, second: LowRankUpdate) -> float:
    """<D1, D2>, the sum of the products of their entries."""
    return float(((first.b.T @ second.b) * (first.a @ second.a.T)).sum())


def norm(low: LowRankUpdate) -> float:
    """||D||, Frobenius."""
    return math.sqrt(max(inner(low, low), 0.0))


def slerp(first: LowRankUpdate, second: LowRankUpdate, t: float) -> tuple[float, float]:
    """The coefficients of spherical interpolation, t from 0 (first) to 1 (second): sin((1-t) w) / sin w, sin(t w) / sin w.

    w is the angle between the updates (Shoemake 1985); straight interpolation where they are parallel, or one is zero.
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
    """The best approximation of rank `rank`, or of the smallest rank that keeps `energy`, by two thin QR and a small SVD."""
    qb, rb = torch.linalg.qr(low.b)
    qa, ra = torch.linalg.qr(low.a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    keep = choose_rank(s, float(s.square().sum()), rank, energy)
    return TruncatedUpdate(
        _balanced(qb @ u[:, :keep], s[:keep], (qa @ vh.T[:, :keep]).T),
        _share(s, keep, float(s.square().sum())),
    )


def truncate_dense(
    matrix: Tensor, rank: int | None, energy: float | None = None
) -> TruncatedUpdate:
    """The same for a dense update (out, in), float32 or float64.

    A wide matrix of which few directions are wanted is decomposed by random products (of fixed seed), twice as many each
    time until they keep `energy`; the energy told is a share of the exact norm.
    """
    total = float(matrix.double().square().sum())
    u, s, vh = _decomposed(matrix, total, rank, energy)
    keep = choose_rank(s, total, rank, energy)
    return TruncatedUpdate(_balanced(u[:, :keep], s[:keep], vh[:keep]), _share(s, keep, total))


def _decomposed(
    matrix: Tensor, total: float, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of as many of the largest directions as are wanted, or of all."""
    wanted = rank if energy is None else min(FIRST, rank or FIRST)
    while (
        wanted is not None
        and min(matrix.shape) > SMALL
        and wanted + OVERSAMPLE <= min(matrix.shape) // 3
    ):
        u, s, vh = _by_products(matrix, wanted)
        if energy is None or wanted == rank or _share(s, wanted, total) >= energy:
            return u, s, vh
        wanted = 2 * wanted if rank is None else min(2 * wanted, rank)
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def _by_products(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, n), S (n), V^T (n, in) of the largest n = rank + 16 directions, from products with thin matrices only."""
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(matrix.shape[1], rank + OVERSAMPLE, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ thin)[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vh = torch.linalg.svd((basis.T @ matrix).double(), full_matrices=False)
    return basis.double() @ u, s, vh


def choose_rank(s: Tensor, total: float, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep (at least one): `rank` at most, and no more than `energy` needs."""
    keep = len(s) if rank is None else min(rank, len(s))
    if energy is not None and total > 0:
        # a hair less than asked: the sum of all of them may round to less than the total
        enough = int((s.square().cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1
        keep = min(keep, enough)
    return max(keep, 1)


def _share(s: Tensor, keep: int, total: float) -> float:
    return min(1.0, float(s[:keep].square().sum()) / total) if total > 0 else 1.0


def _balanced(u: Tensor, s: Tensor, vh: Tensor) -> LowRankUpdate:
    """Half of each singular value on either side, so that both factors are of like size in float32."""
    root = s.sqrt()
    return LowRankUpdate(u * root, root[:, None] * vh)
