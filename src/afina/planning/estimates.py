"""Data of a plan: rates of a machine, sizes of the passes, and bytes and seconds of a run."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise

THIN = 8  # columns


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of a machine in operations and bytes per second; `matmul_rates` by rows."""

    matmul_rates: dict[str, Sequence[Sequence[float]]]
    attention: dict[
        str, Sequence[Sequence[float]]
    ]  # (length, rate) by dtype; backwards counts for 2.5 times forwards
    skinny_matmul_rates: dict[
        str, float
    ]  # products with THIN columns: with fewer they take as long
    copy_bandwidth: float  # bytes read and written
    dequantise: float  # weights written out of NF4
    time_factor: float  # measured over counted time, of a real step
    seconds_per_layer: (
        float  # seconds a block and pass, forwards and backwards, however few the tokens
    )
    libraries: float  # bytes of a process that has loaded, besides what is counted
    overlaps: bool = False  # whether the device computes while Python goes on
    allocator_overhead: float = (
        1.0  # what a real step's activations took over what is counted for them, where that is more
    )

    def rate(self, dtype: str, rows: float) -> float:
        """Operations a second of products with `rows` rows."""
        return _between(self.matmul_rates[dtype], rows)

    def attention_rate(self, dtype: str, length: float) -> float:
        """Operations a second of attention, forwards and backwards, over sequences of `length`."""
        return _between(self.attention[dtype], length)


def _between(points: Sequence[Sequence[float]], rows: float) -> float:
    """The rate at `rows`: between those measured, on a straight line over log rows."""
    if rows <= points[0][0]:
        return points[0][1] * rows / points[0][0]
    for (few, slow), (many, fast) in pairwise(points):
        if rows <= many:
            return slow + (fast - slow) * math.log(rows / few) / math.log(many / few)
    return points[-1][1]


@dataclass(frozen=True)
class Workload:
    """Sizes of a run's passes: tokens, target tokens and longest sequence, largest and mean."""

    tokens: int
    labels: int
    max_length: int
    mean_tokens: float
    mean_labels: float
    mean_length: float  # tokens that a token's sequence has
    num_micro_batches: int = 1  # before each optimizer step
    # tokens of all sequences over those computed: attention reads shared prefixes once each
    attention_ratio: float = 1.0

    @classmethod
    def full(cls, tokens: int, length: int, passes: int = 1, labelled: float = 1.0) -> "Workload":
        """Every pass full, of sequences of one length."""
        length, labels = min(length, tokens), max(1, round(tokens * labelled))
        return cls(tokens, labels, length, tokens, labels, length, passes)

    def at(self, tokens: int) -> "Workload":
        """The same kind of rows in passes of `tokens`."""
        share = tokens / self.tokens
        length = min(self.max_length, tokens)
        return replace(
            self,
            tokens=tokens,
            labels=max(1, round(self.labels * share)),
            max_length=length,
            mean_tokens=self.mean_tokens * share,
            mean_labels=self.mean_labels * share,
            mean_length=min(self.mean_length, tokens),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the largest moment of a run, by what they are for."""

    libraries: float
    weights: float
    learned: float
    optimizer: float
    activations: float
    other: float  # gradients, the loss, what lives within a block

    @property
    def peak(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of an optimizer step, by what takes them."""

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
        """All of it; where the device computes meanwhile, the longer of computing and of Python."""
        work = sum(asdict(self).values()) - self.overhead - self.overlaps
        return max(work, self.overhead) if self.overlaps else work + self.overhead
