"""Confidence intervals and significance tests of means over few rows and few seeds, in float64.

All intervals are 95% unless a confidence is given; the distributions are scipy's. A row is the
unit: rows are independent, the targets of one row are not.

**Means.** A table x `(S, N)` has one value per seed and row: a score, or a loss. Both are samples:
other seeds and other rows would give another mean. Seeds and rows are crossed, as every seed is
evaluated on the same rows:

    x[s, i] = mean + a[s] + b[i] + e[s, i]

    MSs = N sum a² / (S - 1)    MSr = S sum b² / (N - 1)    MSe = sum e² / ((S - 1)(N - 1))
    variance of the mean = (MSr + max(0, MSs - MSe)) / (S N)

The estimate that is truncated at zero is a little too large, never too small on average. The error
is a sum of two Student's t variables, of the rows with N - 1 and of the seeds with S - 1 degrees of
freedom, as in the Behrens-Fisher problem: Satterthwaite's single t gave up to 7.7 false alarms in
100 with three seeds that differ much, this one at most 4.9; with two seeds it is up to 6.5. With
one seed the test is the plain t test over rows, and the variance between seeds is unknown.

**Ratios.** The loss per target token is sum d / sum n over rows with n[i] target tokens each.
`linearized_ratio` converts it to a table of one value per row with the same mean and, to first
order, the same error, so that every interval of a mean applies to it.

References:
    Searle, Casella, McCulloch, Variance Components, 1992, section 4.3 (two-way random effects).
    Cochran, Sampling Techniques, 1977, sections 6.3 and 6.4 (ratios of two sums).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 2000
QUADRATURE_POINTS = 400  # 4,000 change no third digit
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean with standard error and 95% interval; both are None with a single row."""

    mean: float
    error: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return plain values, for JSON."""
        return {"mean": self.mean, "error": self.error, "low": self.low, "high": self.high}


def linearized_ratio(sums: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """Return a table whose mean is sum(sums) / sum(weights): the linearized ratio, row by row.

    Args:
        sums: Values summed per row, such as losses over target tokens, `(S, N)`.
        weights: Their counts, such as target tokens, `(N,)`.

    References:
        Cochran, Sampling Techniques, 1977, section 6.3.
    """
    x, w = np.atleast_2d(np.asarray(sums, float)), np.asarray(weights, float)
    mean = x.sum() / (len(x) * w.sum())
    return mean + (x - mean * w) / w.mean()


def _squares(x: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return (MSs, MSr, MSe); those that one seed cannot determine are 0."""
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
    """Variance of a mean due to rows and due to seeds, each with its degrees of freedom."""

    rows: float
    rows_freedom: float
    seeds: float = 0.0
    seeds_freedom: float = 1.0

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.rows + self.seeds)

    def two_sided_p(self, distance: float) -> float:
        """Return the two-sided p-value of a mean at this distance from 0."""
        from scipy.special import stdtr, stdtrit  # Student's t: its CDF and its quantile

        distance = abs(distance)
        if self.seeds == 0.0:
            return float(2 * stdtr(self.rows_freedom, -distance / math.sqrt(self.rows)))
        steps = (np.arange(QUADRATURE_POINTS) + 0.5) / QUADRATURE_POINTS
        of_rows = math.sqrt(self.rows) * stdtrit(self.rows_freedom, steps)
        t = (of_rows - distance) / math.sqrt(self.seeds)
        return float(2 * stdtr(self.seeds_freedom, t).mean())

    @property
    def reach(self) -> float:
        """Half the width of the 95% interval."""
        from scipy.special import stdtrit

        if self.seeds == 0.0:
            return float(stdtrit(self.rows_freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(self.rows)
        from scipy.optimize import brentq

        freedom = min(self.rows_freedom, self.seeds_freedom)
        bound = 3 * self.error * float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
        return float(
            brentq(lambda d: self.two_sided_p(d) - (1 - CONFIDENCE), 0.0, bound, rtol=1e-6)
        )

    def around(self, mean: float) -> Estimate:
        """Return the estimate of a mean with this variance."""
        reach = self.reach if self.error else 0.0
        return Estimate(mean, self.error, mean - reach, mean + reach)


def variance_components(table: ArrayLike) -> VarianceComponents:
    """Return the variance of the mean of a table `(S, N)` with at least two rows."""
    x = np.atleast_2d(np.asarray(table, float))
    of_seeds, of_rows, rest = _squares(x)
    return VarianceComponents(
        of_rows / x.size, x.shape[1] - 1, max(0.0, of_seeds - rest) / x.size, max(1, x.shape[0] - 1)
    )


def crossed_estimate(table: ArrayLike, seed: int = 0) -> Estimate:
    """Return the mean of a table `(S, N)` with a 95% interval by bootstrap over rows and seeds.

    Rows are resampled with all their seeds, so that a percentage near 0 or 100 keeps its asymmetric
    interval. Resampling two or three seeds is of no use (three values have ten means): their part
    is sampled from Student's t with their degrees of freedom.
    """
    x = np.atleast_2d(np.asarray(table, float))
    seeds, rows = x.shape
    mean = float(x.mean())
    if rows < 2:
        return Estimate(mean, None, None, None)
    found, random = variance_components(x), np.random.default_rng(seed)
    counts = random.multinomial(rows, np.full(rows, 1 / rows), size=NUM_RESAMPLES)
    sampled = mean + math.sqrt(rows / (rows - 1)) * (counts @ x.mean(0) / rows - mean)
    if seeds > 1:
        sampled += math.sqrt(found.seeds) * random.standard_t(seeds - 1, NUM_RESAMPLES)
    low, high = np.quantile(sampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, found.error, float(low), float(high))


def percentage_estimate(table: ArrayLike, seed: int = 0) -> Estimate:
    """Return the mean of scores in percent; Clopper-Pearson's interval where all are 0 or all 100.

    With 0 of 10 correct the true rate may be up to 31%.
    """
    x = np.atleast_2d(np.asarray(table, float))
    found = crossed_estimate(x, seed)
    if x.shape[1] > 1 and float(x.min()) == float(x.max()) in (0.0, 100.0):
        reach = zero_count_bound(x.shape[1])
        low, high = (0.0, reach) if found.mean == 0.0 else (100.0 - reach, 100.0)
        return Estimate(found.mean, found.error, low, high)
    if found.low is None or found.high is None:
        return found
    return Estimate(found.mean, found.error, max(0.0, found.low), min(100.0, found.high))


def zero_count_bound(rows: int) -> float:
    """Return the upper bound, in percent, of a rate of which 0 of `rows` were observed (95%)."""
    return 100.0 * (1 - ((1 - CONFIDENCE) / 2) ** (1 / rows))


def paired_difference(one: ArrayLike, other: ArrayLike) -> tuple[Estimate, float]:
    """Return the mean difference of two paired tables `(S, N)`, and its two-sided p-value.

    With one seed this is scipy's `ttest_rel`. The p-value is at least 2^(1 - rows that differ),
    the bound of the exact sign test.
    """
    x = np.atleast_2d(np.asarray(one, float) - np.asarray(other, float))
    mean, rows = float(x.mean()), x.shape[1]
    if rows < 2:
        return Estimate(mean, None, None, None), 1.0
    found = variance_components(x)
    least = min(1.0, 2.0 ** (1 - int(np.count_nonzero(x.mean(0)))))
    return found.around(mean), max(least, found.two_sided_p(mean)) if found.error else least


def unpaired_difference(one: ArrayLike, other: ArrayLike) -> Estimate:
    """Return the difference of the means of two tables over different rows (rows: Welch)."""
    a, b = np.atleast_2d(np.asarray(one, float)), np.atleast_2d(np.asarray(other, float))
    mean = float(a.mean() - b.mean())
    if min(a.shape[1], b.shape[1]) < 2:
        return Estimate(mean, None, None, None)
    x, y = variance_components(a), variance_components(b)
    rows = x.rows + y.rows
    freedom = x.rows_freedom
    if rows:
        freedom = rows**2 / (x.rows**2 / x.rows_freedom + y.rows**2 / y.rows_freedom)
    seeds_freedom = min(x.seeds_freedom, y.seeds_freedom)
    return VarianceComponents(rows, freedom, x.seeds + y.seeds, seeds_freedom).around(mean)


@dataclass(frozen=True)
class LossChange:
    """Change of a mean loss in nats per target (negative is better), its error, and the rows."""

    rows: int
    mean: float
    error: float | None  # standard error; None with one row

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval; None with one row."""
        if self.error is None:
            return None
        reach = VarianceComponents(self.error**2, self.rows - 1).reach
        return self.mean - reach, self.mean + reach

    def minus(self, other: "LossChange") -> "LossChange":
        """Return the difference to a change over other rows."""
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if known else None
        return LossChange(min(self.rows, other.rows), self.mean - other.mean, error)


def paired_change(
    before: Sequence[float], after: Sequence[float], num_targets: Sequence[int]
) -> LossChange:
    """Return the change between two lists of losses, each summed over the targets of its row."""
    table = linearized_ratio(np.subtract(after, before), num_targets)
    rows = len(num_targets)
    error = variance_components(table).error if rows > 1 else None
    return LossChange(rows, float(table.mean()), error)


def wilson_interval(wins: int, of: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's interval of the ratio of `wins` among `of` (at least one) trials.

    References: Wilson 1927, J. Am. Stat. Assoc. 22, 209.
    """
    from scipy.stats import binomtest

    interval = binomtest(wins, of).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple tests by Holm's method (1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points; lower is better in every coordinate."""
    x = np.asarray(points, float)
    return [i for i, p in enumerate(x) if not np.any(np.all(x <= p, 1) & np.any(x < p, 1))]
