"""Who acts where: the table of segments of one forward, and the switchboard that hands it to the layers.

    tokens    | a a a a a | b b b | c c c c c c |        one flat run, three sequences
    segments  |  (0, 5, "tone", 1.0)                     "tone" everywhere on the first
              |              (6, 8, "judge", 1.0)        an activated adapter, from its invocation on
              |                      (8, 14, "tone", .5) (8, 14, "law", .5)    a sum of two on the third

Everything between one adapter and a thousand is this table. The usual case, one adapter on every token, is
a table that says so and costs nothing.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal


@dataclass(frozen=True)
class Segment:
    """Tokens start..end (end excluded) of the flat run pass through `adapter` with `weight`."""

    start: int
    end: int
    adapter: str
    weight: float = 1.0


@dataclass(frozen=True)
class Segments:
    """The table of one forward: nobody, some adapters everywhere, or rows over parts of the run.

    `everywhere` holds (adapter, weight) pairs that act on all tokens; `rows` the others. Rows count tokens of the
    flat run, or, for models that take rows of equal length (image models, pooled encoders), rows of the batch.
    """

    global_adapters: tuple[tuple[str, float], ...] = ()
    spans: tuple[Segment, ...] = ()
    unit: Literal["token", "row"] = "token"

    @classmethod
    def on_all_tokens(cls, adapter: str, weight: float = 1.0) -> "Segments":
        """One adapter on every token."""
        return cls(global_adapters=((adapter, weight),))

    def slice(self, start: int, end: int) -> "Segments":
        """The table of tokens start..end alone, counted from there."""
        parts = [
            replace(row, start=max(row.start, start) - start, end=min(row.end, end) - start)
            for row in self.spans
        ]
        return replace(self, spans=tuple(row for row in parts if row.start < row.end))

    def common_prefix_length(self, first: int, second: int, length: int) -> int:
        """How many of `length` tokens from `first` and from `second` on are surely under the same rows."""
        one, other = (
            {
                (max(0, r.start - start), min(length, r.end - start), r.adapter, r.weight)
                for r in self.spans
                if r.start < start + length and r.end > start
            }
            for start in (first, second)
        )
        return min((start for start, *_ in one ^ other), default=length)

    def select(self, tokens: Sequence[int]) -> "Segments":
        """The table of some tokens alone, given in ascending order: for what is computed at these only."""
        if not self.spans:
            return self
        parts = [
            replace(r, start=bisect_left(tokens, r.start), end=bisect_left(tokens, r.end))
            for r in self.spans
        ]
        return replace(self, spans=tuple(row for row in parts if row.start < row.end))

    @classmethod
    def concat(cls, tables: Sequence["Segments"], lengths: Sequence[int]) -> "Segments":
        """The table of several runs laid end to end, each under its own table."""
        rows: list[Segment] = []
        for table, length, start in zip(
            tables, lengths, accumulate(lengths, initial=0), strict=False
        ):
            rows += [
                Segment(start, start + length, adapter, weight)
                for adapter, weight in table.global_adapters
            ]
            rows += [
                replace(row, start=row.start + start, end=row.end + start) for row in table.spans
            ]
        return cls(spans=tuple(rows))


NO_ADAPTERS = Segments()


class ForwardContext:
    """The segments of the forward that the current thread runs; one a model, none global.

    Training and serving may share a model: each thread sees the table that it set. A checkpointed block
    remembers its table (`remember`) and restores it when its forward is recomputed, in whatever thread.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def segments(self) -> Segments:
        """The table of this thread's forward; the base alone where none was set."""
        return getattr(self._local, "segments", NO_ADAPTERS)

    @contextmanager
    def use(self, segments: Segments) -> Iterator[None]:
        """Within the block, this thread's forwards follow `segments`."""
        before = self.segments
        self._local.segments = segments
        try:
            yield
        finally:
            self._local.segments = before

    def checkpoint_contexts(
        self,
    ) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
        """For torch.utils.checkpoint(context_fn=...): recomputation follows the table of the first forward."""

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), self.use(self.segments)

        return contexts
