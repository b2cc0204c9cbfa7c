"""Intervals of changes, shares and means; 95% unless a confidence is given. Distributions are scipy's.

    d[i] = loss of row i with the adapter - without it (nats, summed over its n[i] targets)
    mean = sum d / sum n        error^2 = k / (k - 1)  sum (d[i] - mean n[i])^2  /  (sum n)^2     k rows
    interval = mean +- t(k - 1) error

Targets of one row are not independent, rows are: hence a row is the unit. The error is that of a
ratio of two sums (Cochran, Sampling Techniques, 1977, section 6.4); t, since few rows are usual.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


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
        reach = t_quantile(self.rows - 1) * self.error
        return self.mean - reach, self.mean + reach

    def minus(self, other: "LossChange") -> "LossChange":
        """Return the difference to a change over other rows."""
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if known else None
        return LossChange(min(self.rows, other.rows), self.mean - other.mean, error)


@lru_cache
def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Return a quantile of Student's t with `freedom` degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(probability, freedom))


def paired_change(
    before: Sequence[float], after: Sequence[float], labels: Sequence[int]
) -> LossChange:
    """Return the change between two lists of losses, each summed over the `labels` of its row."""
    rows, total = len(labels), sum(labels)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(differences) / total
    if rows < 2:
        return LossChange(rows, mean, None)
    squares = sum((d - mean * n) ** 2 for d, n in zip(differences, labels, strict=True))
    return LossChange(rows, mean, math.sqrt(rows / (rows - 1) * squares) / total)


def wilson_interval(wins: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share of `of` (at least one) trials.

    References: Wilson 1927, J. Am. Stat. Assoc. 22, 209.
    """
    from scipy.stats import binomtest

    interval = binomtest(wins, of).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
