"""Statistics of one module's update D = s B A, from r x r cores alone, in numpy; D is never built.

    B = Qb Rb, A^T = Qa Ra,  s Rb Ra^T = X S Y^T        S: singular values of D (out, in)
    u = s B (Ra^T y) / S,  v = s A^T (Rb^T x) / S       singular vectors, without Qb and Qa

R is a root of the Gram matrix, R^T R = B^T B, in float64: exact to 1e-8 of the largest singular
value, as exact as the factors in a file (float32 at best), in a quarter of the time of QR.

Each statistic has no unit, so that modules of different sizes are comparable:

    energy1               S1^2 / sum S^2
    stable                sum S^2 / S1^2 / r
    entropy               of S^2 / sum, divided by log r
    norm                  log ||D|| / sqrt(out in)
    participation_out     1 / (out * sum u1^4): 1 if spread evenly, 1/out on one row
    participation_in      the same of v1
    rows8, columns8       ratio of ||D||^2 in the 8 largest, divided by that of an even spread
    hoyer_out, hoyer_in   of the norms of rows (columns): 0 if even, 1 if a single one
    kurtosis              of the entries of D in 64 sampled rows: 3 for a Gaussian
"""

import math
from dataclasses import dataclass

import numpy as np

SAMPLED = 64  # rows of D of which kurtosis is computed
PIECE = 1024  # rows that are multiplied at a time: they stay in the cache


@dataclass(frozen=True)
class UpdateSpectrum:
    """Singular values of D `(r,)`, descending, and its leading vectors u, v, float32."""

    values: np.ndarray
    u: np.ndarray
    v: np.ndarray

    @property
    def norm(self) -> float:
        """||D|| (Frobenius)."""
        return float(np.sqrt((self.values**2).sum()))


def core_of_dense(matrix: np.ndarray) -> UpdateSpectrum:
    """Return all statistics of a full matrix `(out, in)`: MoRA's M, or a weight's difference."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return UpdateSpectrum(values, u[:, 0].astype(np.float32), vt[0].astype(np.float32))


def of_factors(
    b: np.ndarray, a: np.ndarray, scale: float
) -> tuple[dict[str, float], UpdateSpectrum]:
    """Return all statistics of D = scale * b a, and its core; an update of zero has none."""
    rb, ra = root(b), root(a.T)
    x, values, yt = np.linalg.svd(scale * rb @ ra.T, full_matrices=False)
    if not values[0] > 0:
        return {}, UpdateSpectrum(
            values, np.zeros(len(b), np.float32), np.zeros(a.shape[1], np.float32)
        )
    u, v = scale * (b @ (ra.T @ yt[0])) / values[0], scale * (a.T @ (rb.T @ x[:, 0])) / values[0]
    core = UpdateSpectrum(values, u.astype(np.float32), v.astype(np.float32))
    sampled = scale * b[_sample(len(b))] @ a
    return _all(core, row_squares(b, scale * ra), row_squares(a.T, scale * rb), sampled), core


def root(matrix: np.ndarray) -> np.ndarray:
    """Return R `(r, r)`, float64, with R^T R = M^T M of a matrix M `(n, r)`."""
    gram = np.zeros((matrix.shape[1],) * 2)
    for start in range(0, len(matrix), PIECE):
        piece = matrix[start : start + PIECE].astype(np.float64)
        gram += piece.T @ piece
    squares, vectors = np.linalg.eigh(gram)
    return np.asarray(np.sqrt(np.maximum(squares, 0))[:, None] * vectors.T)


def row_squares(matrix: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return squared lengths `(n,)` of the rows of matrix `(n, r)` @ other.T."""
    transposed, squares = other.T.astype(matrix.dtype), np.empty(len(matrix))
    for start in range(0, len(matrix), PIECE):
        piece = matrix[start : start + PIECE] @ transposed
        squares[start : start + PIECE] = np.einsum("ij,ij->i", piece, piece)
    return squares


def of_dense(matrix: np.ndarray) -> tuple[dict[str, float], UpdateSpectrum]:
    """Return all statistics of a matrix `(out, in)`."""
    core = core_of_dense(matrix)
    if not core.norm > 0:
        return {}, core
    squares = matrix**2
    return _all(core, squares.sum(1), squares.sum(0), matrix[_sample(len(matrix))]), core


def _sample(rows: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows)[:SAMPLED]


def _all(
    core: UpdateSpectrum, rows: np.ndarray, columns: np.ndarray, sampled: np.ndarray
) -> dict[str, float]:
    squares = core.values**2
    total, rank = float(squares.sum()), len(squares)
    share = squares / total
    out, inner = len(rows), len(columns)
    return {
        "energy1": float(share[0]),
        "stable": float(1 / share[0] / rank),
        "entropy": float(-(share[share > 0] * np.log(share[share > 0])).sum() / math.log(rank))
        if rank > 1
        else 1.0,
        "norm": math.log(core.norm / math.sqrt(out * inner)),
        "participation_out": participation(core.u),
        "participation_in": participation(core.v),
        "rows8": top_share(rows),
        "columns8": top_share(columns),
        "hoyer_out": hoyer(np.sqrt(np.maximum(rows, 0))),
        "hoyer_in": hoyer(np.sqrt(np.maximum(columns, 0))),
        "kurtosis": kurtosis(sampled),
    }


def participation(vector: np.ndarray) -> float:
    """Return 1 / (n sum x^4) of a unit vector: 1 if spread evenly, 1/n if one entry."""
    return float(1 / (len(vector) * (vector**4).sum()))


def top_share(squares: np.ndarray, count: int = 8) -> float:
    """Return the log of the ratio of the `count` largest, divided by that of equal values."""
    count = min(count, len(squares))
    return math.log(
        float(np.partition(squares, -count)[-count:].sum() / squares.sum()) * len(squares) / count
    )


def hoyer(norms: np.ndarray) -> float:
    """Return Hoyer's sparsity (2004), (sqrt n - l1 / l2) / (sqrt n - 1): 0 if all are equal."""
    n = len(norms)
    return (
        float((math.sqrt(n) - norms.sum() / np.sqrt((norms**2).sum())) / (math.sqrt(n) - 1))
        if n > 1
        else 0.0
    )


def kurtosis(values: np.ndarray) -> float:
    """Return the fourth central moment divided by the squared variance."""
    squares = (values - values.mean(dtype=np.float64)) ** 2
    second = float(squares.mean())
    return (
        float((squares**2).mean()) / second**2 if second > 0 else 3.0
    )  # numpy's **4 is a power: 20 times as slow


def coherence(vectors: list[np.ndarray]) -> float:
    """Return the mean |cosine| of pairs of unit vectors, divided by that of random ones."""
    if len(vectors) < 2:
        return 1.0
    stack = np.stack(vectors)
    cosines = np.abs(stack @ stack.T)[np.triu_indices(len(stack), 1)]
    return float(cosines.mean() / math.sqrt(2 / (math.pi * stack.shape[1])))


def robust_z(values: np.ndarray) -> np.ndarray:
    """Return distances from the median in units of 1.4826 MAD (robust z)."""
    middle = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - middle))
    return (values - middle) / (
        spread if spread > 0 else max(float(np.abs(values - middle).max()), 1e-12)
    )
