"""Active adapters of one forward pass, by token range, and the context that passes them to layers.

    tokens    | a a a a a | b b b | c c c c c c |    one packed batch, three sequences
    segments  |  (0, 5, "tone", 1.0)                 "tone" on all tokens of the first
              |              (6, 8, "law", 1.0)      active from its invocation tokens on
              |                      (8, 14, "tone", .5) (8, 14, "law", .5)    weighted sum of two

The usual case, one adapter on all tokens, is `global_adapters`: layers then index no tokens.
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
    """Token range of the packed batch with an active adapter.

    Attributes:
        start: first token.
        end: token after the last one.
        adapter: its name in the layers.
        weight: factor of its update.
    """

    start: int
    end: int
    adapter: str
    weight: float = 1.0


@dataclass(frozen=True)
class Segments:
    """Active adapters of one forward pass: none, on all tokens, or on token ranges.

    Attributes:
        global_adapters: pairs (adapter, weight) that are active on all tokens.
        spans: adapters that are active on ranges.
        unit: what the ranges count: tokens of the packed batch, or rows of a padded batch for
            models that take no packed one (image models, pooled encoders).
    """

    global_adapters: tuple[tuple[str, float], ...] = ()
    spans: tuple[Segment, ...] = ()
    unit: Literal["token", "row"] = "token"

    @classmethod
    def on_all_tokens(cls, adapter: str, weight: float = 1.0) -> "Segments":
        """Return segments with one adapter on all tokens."""
        return cls(global_adapters=((adapter, weight),))

    def slice(self, start: int, end: int) -> "Segments":
        """Return the segments of tokens `start` to `end` (excluded), counted from `start`."""
        parts = [
            replace(row, start=max(row.start, start) - start, end=min(row.end, end) - start)
            for row in self.spans
        ]
        return replace(self, spans=tuple(row for row in parts if row.start < row.end))

    def common_prefix_length(self, first: int, second: int, length: int) -> int:
        """Return how many of `length` tokens from `first` and `second` on have equal segments."""
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
        """Return the segments of `tokens`, ascending indices, counted within `tokens`."""
        if not self.spans:
            return self
        parts = [
            replace(r, start=bisect_left(tokens, r.start), end=bisect_left(tokens, r.end))
            for r in self.spans
        ]
        return replace(self, spans=tuple(row for row in parts if row.start < row.end))

    def in_tokens(self, tokens_per_row: int) -> "Segments":
        """Return spans of rows as spans of the tokens of the flattened batch."""
        if self.unit == "token":
            return self
        spans = [
            replace(span, start=span.start * tokens_per_row, end=span.end * tokens_per_row)
            for span in self.spans
        ]
        return Segments(self.global_adapters, tuple(spans))

    @classmethod
    def concat(cls, tables: Sequence["Segments"], lengths: Sequence[int]) -> "Segments":
        """Return the segments of several batches that are concatenated, `lengths` tokens each."""
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
    """Segments of the forward pass that the current thread runs, one context per model.

    Training and serving may share a model: each thread reads the segments that it set. A
    checkpointed layer keeps its segments (`checkpoint_contexts`) and restores them when its
    forward pass is recomputed, in any thread.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def segments(self) -> Segments:
        """Segments of this thread's forward pass; `NO_ADAPTERS` where none were set."""
        return getattr(self._local, "segments", NO_ADAPTERS)

    @contextmanager
    def use(self, segments: Segments) -> Iterator[None]:
        """Set the segments of this thread's forward passes within the `with` statement."""
        before = self.segments
        self._local.segments = segments
        try:
            yield
        finally:
            self._local.segments = before

    def checkpoint_contexts(
        self,
    ) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
        """Return `context_fn` of `torch.utils.checkpoint`, which recomputes with equal segments."""

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), self.use(self.segments)

        return contexts
