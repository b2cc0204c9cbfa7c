"""Data of a plan: rates of a machine, sizes of the passes, and bytes and seconds of a run."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise

from afina.objectives.workload import StepWorkload

# Columns of the product by which low-rank products are measured: with fewer they take as long.
SKINNY_COLUMNS = 8


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of a machine, in operations and bytes per second.

    Attributes:
        matmul_rates: (rows, rate) of matrix products by dtype.
        attention: (length, rate) of attention by dtype; backward counts as 2.5 times forward.
        skinny_matmul_rates: Rate of products with `SKINNY_COLUMNS` columns by dtype.
        copy_bandwidth: Bytes read and written per second.
        dequantize: Weights dequantized from NF4 per second.
        time_factor: Measured over counted seconds of a real step.
        seconds_per_layer: Overhead of a layer and pass, forward and backward, for any tokens.
        libraries: Bytes of a process with a loaded model, besides what is counted.
        overlaps: Whether the device computes while Python continues.
        allocator_overhead: Allocated over counted bytes of a real step's activations, at least 1.
    """

    matmul_rates: dict[str, Sequence[Sequence[float]]]
    attention: dict[str, Sequence[Sequence[float]]]
    skinny_matmul_rates: dict[str, float]
    copy_bandwidth: float
    dequantize: float
    time_factor: float
    seconds_per_layer: float
    libraries: float
    overlaps: bool = False
    allocator_overhead: float = 1.0

    def rate(self, dtype: str, rows: float) -> float:
        """Return the operations per second of products with `rows` rows."""
        return _between(self.matmul_rates[dtype], rows)

    def attention_rate(self, dtype: str, length: float) -> float:
        """Return the operations per second of attention over sequences of `length` tokens."""
        return _between(self.attention[dtype], length)


def _between(points: Sequence[Sequence[float]], rows: float) -> float:
    """Return the rate at `rows`, interpolated linearly over log(rows) between those measured."""
    if rows <= points[0][0]:
        return points[0][1] * rows / points[0][0]
    for (few, slow), (many, fast) in pairwise(points):
        if rows <= many:
            return slow + (fast - slow) * math.log(rows / few) / math.log(many / few)
    return points[-1][1]


@dataclass(frozen=True)
class Workload:
    """Sizes of a run's passes: tokens, target tokens and longest sequence, largest and mean.

    Attributes:
        mean_length: Mean, over tokens, of the length of a token's sequence.
        num_micro_batches: Micro-batches per optimizer step.
        attention_ratio: Tokens of all sequences over those computed: attention reads shared
            prefixes once for each sequence.
    """

    tokens: int
    labels: int
    max_length: int
    mean_tokens: float
    mean_labels: float
    mean_length: float
    num_micro_batches: int = 1
    attention_ratio: float = 1.0

    @classmethod
    def full(cls, tokens: int, length: int, passes: int = 1, labelled: float = 1.0) -> "Workload":
        """Return passes that are all full, of sequences of one length."""
        length, labels = min(length, tokens), max(1, round(tokens * labelled))
        return cls(tokens, labels, length, tokens, labels, length, passes)

    @classmethod
    def of(cls, workload: StepWorkload) -> "Workload":
        """Return the sizes of an objective's passes."""
        sizes = [one for passes in workload.passes for one in passes]
        lengths = [length for one in sizes for length in one.lengths]
        return cls(
            tokens=max(one.tokens for one in sizes),
            labels=max(one.targets for one in sizes),
            max_length=max(lengths),
            mean_tokens=sum(one.tokens for one in sizes) / len(sizes),
            mean_labels=sum(one.targets for one in sizes) / len(sizes),
            mean_length=sum(n * n for n in lengths) / sum(lengths),
            num_micro_batches=max(1, round(len(sizes) / len(workload.passes))),
            attention_ratio=workload.attention_ratio,
        )

    def at(self, tokens: int) -> "Workload":
        """Return passes of `tokens` tokens over the same rows."""
        ratio = tokens / self.tokens
        return replace(
            self,
            tokens=tokens,
            labels=max(1, round(self.labels * ratio)),
            max_length=min(self.max_length, tokens),
            mean_tokens=self.mean_tokens * ratio,
            mean_labels=self.mean_labels * ratio,
            mean_length=min(self.mean_length, tokens),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run; `other` are gradients, the loss and temporaries of a layer."""

    libraries: float
    weights: float
    learned: float
    optimizer: float
    activations: float
    other: float

    @property
    def peak(self) -> float:
        """Sum of all parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of an optimizer step by operation."""

    products: float
    attention: float
    adapters: float
    dequantisation: float
    activations: float
    optimizer: float
    overhead: float
    overlaps: bool = False

    @property
    def step(self) -> float:
        """Sum of all parts; where device and Python overlap, the longer of the two."""
        work = sum(asdict(self).values()) - self.overhead - self.overlaps
        return max(work, self.overhead) if self.overlaps else work + self.overhead
