"""Metrics as sums and counts, so that their means are exact over batches and processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afina.objectives.base import Total


@dataclass
class MetricSums:
    """Sum and number of the values of each metric."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the values of some metrics, one tensor each."""
        for name, values in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
            self.counts[name] = self.counts.get(name, 0) + values.numel()

    def copy(self) -> "MetricSums":
        """Return an independent copy."""
        return MetricSums(dict(self.sums), dict(self.counts))

    def added_up(self, total: Total) -> "MetricSums":
        """Return the sums over all processes, which count the same metrics."""
        pairs = [[self.sums[name], self.counts[name]] for name in self.sums]
        sums, counts = total(torch.tensor(pairs, dtype=torch.float64).view(-1, 2)).T.tolist()
        return MetricSums(
            dict(zip(self.sums, sums, strict=True)),
            dict(zip(self.sums, map(round, counts), strict=True)),
        )

    def means(self) -> dict[str, float]:
        """Return the mean of each metric that has a value."""
        return {
            name: total / self.counts[name]
            for name, total in self.sums.items()
            if self.counts[name]
        }


def report_metrics(step: MetricSums, check: MetricSums, total: Total) -> dict[str, float]:
    """Return the means of the last step, and with the prefix `eval_` those of the last check."""
    means = {f"eval_{name}": value for name, value in check.means().items()}
    return step.added_up(total).means() | means
