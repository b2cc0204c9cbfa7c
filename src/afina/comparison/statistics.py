"""How sure is a figure that was measured with a few seeds on a few rows? All in float64.

A table x (S, N) holds one number a seed and row: a score, or a loss. Both are samples: other seeds and other rows would
have given another mean. Seeds and rows are crossed, each seed is judged on the same rows:

    x[s, i] = mean + a[s] + b[i] + e[s, i]

    MSs = N sum a² / (S - 1)    MSr = S sum b² / (N - 1)    MSe = sum e² / ((S - 1)(N - 1))
    variance of the mean = (MSr + max(0, MSs - MSe)) / (S N)

(Two-way random effects: Searle, Casella, McCulloch, Variance Components, 1992, section 4.3; the estimate that is cut off
at zero is a little too large, never too small on average.) The error is the sum of two of Student's t, of the rows with
N - 1 and of the seeds with S - 1 degrees of freedom, as in Behrens' and Fisher's problem: Satterthwaite's single t gave
up to 7.7 false alarms in 100 with three seeds that differ much, this one at most 4.9. With two seeds it is up to 6.5.
With one seed all this is the plain t over rows, and nothing is known of what another seed would do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

DRAWS = 2000
GRID = 400  # points of the quadrature; 4,000 change no third digit
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and where the true one lies in 95 of 100 cases; no interval with a single row."""

    mean: float
    error: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Plain values, for JSON."""
        return {"mean": self.mean, "error": self.error, "low": self.low, "high": self.high}


def influence(sums: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """A table whose mean is sum(sums) / sum(weights), row by row: the ratio, linearised (Cochran, 1977, section 6.3).

    `sums` (S, N) are, say, losses summed over the labels of each row, `weights` (N,) the numbers of labels.
    """
    x, w = np.atleast_2d(np.asarray(sums, float)), np.asarray(weights, float)
    mean = x.sum() / (len(x) * w.sum())
    return mean + (x - mean * w) / w.mean()


def _squares(x: NDArray[np.float64]) -> tuple[float, float, float]:
    """(MSs, MSr, MSe); those that one seed cannot tell are 0."""
    seeds, rows = x.shape
    mean = x.mean()
    a, b = x.mean(1) - mean, x.mean(0) - mean
    between_rows = seeds * float(b @ b) / (rows - 1)
    if seeds < 2:
        return 0.0, between_rows, 0.0
    rest = x - mean - a[:, None] - b[None, :]
    return (
        rows * float(a @ a) / (seeds - 1),
        between_rows,
        float((rest * rest).sum()) / ((seeds - 1) * (rows - 1)),
    )


@dataclass(frozen=True)
class VarianceComponents:
    """Variance of a mean: what comes of the rows, and of the seeds, each with its degrees of freedom."""

    rows: float
    rows_freedom: float
    seeds: float
    seeds_freedom: float

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(self.rows + self.seeds)

    def two_sided_p(self, distance: float) -> float:
        """Chance (both sides) that the mean of nothing but noise is so far from 0, or farther."""
        distance = abs(distance)
        if self.seeds == 0.0:
            return float(2 * stats.t.sf(distance / math.sqrt(self.rows), self.rows_freedom))
        steps = (np.arange(GRID) + 0.5) / GRID
        of_rows = math.sqrt(self.rows) * stats.t.ppf(steps, self.rows_freedom)
        return float(
            2 * stats.t.sf((distance - of_rows) / math.sqrt(self.seeds), self.seeds_freedom).mean()
        )

    @property
    def reach(self) -> float:
        """Half of the 95% interval."""
        if self.seeds == 0.0:
            return float(stats.t.ppf((1 + LEVEL) / 2, self.rows_freedom)) * math.sqrt(self.rows)
        most = (
            3
            * self.error
            * float(stats.t.ppf((1 + LEVEL) / 2, min(self.rows_freedom, self.seeds_freedom)))
        )
        return float(
            optimize.brentq(lambda d: self.two_sided_p(d) - (1 - LEVEL), 0.0, most, rtol=1e-6)
        )

    def around(self, mean: float) -> Estimate:
        """The figure of which this is the spread."""
        reach = self.reach if self.error else 0.0
        return Estimate(mean, self.error, mean - reach, mean + reach)


def spread(table: ArrayLike) -> VarianceComponents:
    """The spread of the mean of a table (S, N); needs two rows at least."""
    x = np.atleast_2d(np.asarray(table, float))
    of_seeds, of_rows, rest = _squares(x)
    return VarianceComponents(
        of_rows / x.size, x.shape[1] - 1, max(0.0, of_seeds - rest) / x.size, max(1, x.shape[0] - 1)
    )


def figure(table: ArrayLike, seed: int = 0) -> Estimate:
    """The mean of a table (S, N) with its 95% interval, by a bootstrap over rows and seeds.

    Rows are drawn again with replacement, as they are and all their seeds with them, so that a share near 0 or 100
    keeps its crooked interval. Two or three seeds cannot be drawn again to any purpose (three values have ten means):
    what they add is drawn from Student's t with the degrees of freedom that they have.
    """
    x = np.atleast_2d(np.asarray(table, float))
    seeds, rows = x.shape
    mean = float(x.mean())
    if rows < 2:
        return Estimate(mean, None, None, None)
    found, random = spread(x), np.random.default_rng(seed)
    counts = random.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS)
    drawn = mean + math.sqrt(rows / (rows - 1)) * (counts @ x.mean(0) / rows - mean)
    if seeds > 1:
        drawn += math.sqrt(found.seeds) * random.standard_t(seeds - 1, DRAWS)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, found.error, float(low), float(high))


def share(table: ArrayLike, seed: int = 0) -> Estimate:
    """A figure of scores in percent. Where all rows are 0, or all 100, the interval is Clopper and Pearson's for the rows.

    None right of ten is not "0 for sure": up to 31% could be behind it.
    """
    x = np.atleast_2d(np.asarray(table, float))
    found = figure(x, seed)
    if x.shape[1] > 1 and float(x.min()) == float(x.max()) in (0.0, 100.0):
        reach = zero_count_bound(x.shape[1])
        return Estimate(
            found.mean,
            found.error,
            *((0.0, reach) if found.mean == 0.0 else (100.0 - reach, 100.0)),
        )
    if found.low is None or found.high is None:
        return found
    return Estimate(found.mean, found.error, max(0.0, found.low), min(100.0, found.high))


def zero_count_bound(rows: int) -> float:
    """How many percent may be behind none of so many rows (Clopper and Pearson, 95% with both sides)."""
    return 100.0 * (1 - ((1 - LEVEL) / 2) ** (1 / rows))


def difference(one: ArrayLike, other: ArrayLike) -> tuple[Estimate, float]:
    """(mean difference of two paired tables (S, N) with its interval, two-sided p-value).

    The paired test of `Spread`; with one seed, scipy's `ttest_rel`. So many rows that differ can say so much and no
    more: p is at least 2^(1 - rows that differ), the bound of the exact sign test.
    """
    x = np.atleast_2d(np.asarray(one, float) - np.asarray(other, float))
    mean, rows = float(x.mean()), x.shape[1]
    if rows < 2:
        return Estimate(mean, None, None, None), 1.0
    found = spread(x)
    least = min(1.0, 2.0 ** (1 - int(np.count_nonzero(x.mean(0)))))
    return found.around(mean), max(least, found.two_sided_p(mean)) if found.error else least


def unpaired_difference(one: ArrayLike, other: ArrayLike) -> Estimate:
    """The difference of the means of two tables over different rows, with its interval (rows: Welch)."""
    a, b = np.atleast_2d(np.asarray(one, float)), np.atleast_2d(np.asarray(other, float))
    mean = float(a.mean() - b.mean())
    if min(a.shape[1], b.shape[1]) < 2:
        return Estimate(mean, None, None, None)
    x, y = spread(a), spread(b)
    rows = x.rows + y.rows
    freedom = (
        rows**2 / (x.rows**2 / x.rows_freedom + y.rows**2 / y.rows_freedom)
        if rows
        else x.rows_freedom
    )
    return VarianceComponents(
        rows, freedom, x.seeds + y.seeds, min(x.seeds_freedom, y.seeds_freedom)
    ).around(mean)


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for being several (Holm, 1979): the chance of one false alarm or more stays below the level."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, largest = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = largest
    return corrected


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other one beats: as low in everything, and lower in something. Lower is better."""
    x = np.asarray(points, float)
    return [i for i, p in enumerate(x) if not np.any(np.all(x <= p, 1) & np.any(x < p, 1))]
