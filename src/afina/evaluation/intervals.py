"""How sure is a change of the loss? Row by row, base against adapter, with a 95% interval.

    d[i] = loss of row i with the adapter - without it (nats, summed over its n[i] labels)
    mean = sum d / sum n        error² = k / (k - 1)  sum (d[i] - mean n[i])²  /  (sum n)²       k rows
    interval = mean ± t(k - 1) error

Labels of one row are not independent, rows are: hence a row is the unit. The error is that of a ratio of two sums
(Cochran, Sampling Techniques, 1977, section 6.4); t, since few rows are the usual case.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from afina.adapters.active import ActiveAdapters
from afina.objectives.base import Objective
from afina.objectives.preference import PairwiseObjective

MOST_ROWS = 256  # rows looked at: beyond these the interval is narrow enough for a verdict


@dataclass(frozen=True)
class LossChange:
    """Change of a mean loss in nats a label (negative is better), its standard error, and over how many rows."""

    rows: int
    mean: float
    error: float | None  # None with one row: nothing is known about it

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true change lies in 95 of 100 cases."""
        if self.error is None:
            return None
        reach = t_quantile(self.rows - 1) * self.error
        return self.mean - reach, self.mean + reach

    def minus(self, other: "LossChange") -> "LossChange":
        """By how much this change is larger than one over other rows."""
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if known else None
        return LossChange(min(self.rows, other.rows), self.mean - other.mean, error)


def t_quantile(freedom: int) -> float:
    """The 97.5% point of Student's t: exact for 1 and 2, else within 1% (Abramowitz and Stegun 26.7.5)."""
    series = 1.95996 + 2.37227 / freedom + 2.82250 / freedom**2 + 2.55585 / freedom**3
    return {1: 12.7062, 2: 4.30265}.get(freedom, series)


def paired_change(
    before: Sequence[float], after: Sequence[float], labels: Sequence[int]
) -> LossChange:
    """The change between two lists of losses, each summed over the `labels` of its row."""
    rows, total = len(labels), sum(labels)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(differences) / total
    if rows < 2:
        return LossChange(rows, mean, None)
    squares = sum((d - mean * n) ** 2 for d, n in zip(differences, labels, strict=True))
    return LossChange(rows, mean, math.sqrt(rows / (rows - 1) * squares) / total)


@torch.no_grad()
def row_loss_change(
    task: Objective,
    rows: Sequence[Any],
    route: ActiveAdapters | None,
    before: ActiveAdapters | None = None,
) -> LossChange:
    """The change from `before` to `route` on `rows` of a task; of many rows, on MOST_ROWS spread over them."""
    some = rows[:: -(-len(rows) // MOST_ROWS)]
    if isinstance(task, PairwiseObjective):
        return paired_change(
            task.row_losses(some, before), task.row_losses(some, route), [1] * len(some)
        )
    batches = (task.collate([row], number) for number, row in enumerate(some))
    found = [
        (task.num_targets(b), task.loss(b, before).item(), task.loss(b, route).item())
        for b in batches
    ]
    labels, without, with_it = zip(*found, strict=True)
    return paired_change(without, with_it, labels)
