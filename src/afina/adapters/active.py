"""Activated adapters (aLoRA): the delta acts from the last occurrence of its invocation tokens on.

Greenewald et al. 2025, arXiv 2504.12397

tokens   | the conversation so far ...  | <|assistant|> \\n | the answer ...
adapter  |  off: keys and values are    | on from the first token of the
         |  the base's own              | invocation (as in PEFT)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afina.adapters.segments import Segment, Segments
from afina.errors import DataError


def last_occurrences(
    tokens: Tensor, bounds: Sequence[int], invocation: Sequence[int]
) -> list[int | None]:
    """Where the last `invocation` starts in each sequence of a flat run: index into tokens (T), or None.

    One comparison over the whole run, whatever the number of sequences; an occurrence that crosses a boundary is none.
    """
    size = len(invocation)
    starts = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    if len(tokens) >= size:
        pattern = torch.tensor(invocation, device=tokens.device)
        starts[: len(tokens) - size + 1] = (tokens.unfold(0, size, 1) == pattern).all(-1)
    ends = torch.tensor(bounds[1:], device=tokens.device)
    sequence = torch.searchsorted(ends, torch.arange(len(tokens), device=tokens.device), right=True)
    starts &= torch.arange(len(tokens), device=tokens.device) + size <= ends[sequence]
    index = torch.where(starts, torch.arange(len(tokens), device=tokens.device), -1)
    last = torch.full((len(bounds) - 1,), -1, device=tokens.device)
    last.scatter_reduce_(0, sequence, index, "amax")
    return [position if position >= 0 else None for position in last.tolist()]


def last_start(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where the last `invocation` starts in one sequence, or None."""
    return last_occurrences(torch.tensor(tokens), (0, len(tokens)), invocation)[0]


@dataclass(frozen=True)
class ActiveAdapters:
    """How an attached adapter acts: everywhere, or from its invocation on; with a weight; with others beside it.

    Those `beside` it act over the same tokens, each from its own invocation on: the outputs' parts are summed.
    """

    adapter: str
    invocation: tuple[int, ...] = ()
    weight: float = 1.0
    beside: tuple["ActiveAdapters", ...] = ()

    @classmethod
    def combine(cls, routes: Sequence["ActiveAdapters"]) -> "ActiveAdapters":
        """One route out of several (at least one)."""
        return replace(routes[0], beside=(*routes[0].beside, *routes[1:]))

    def segments(
        self, tokens: Tensor, bounds: Sequence[int], where: Sequence[str] | None = None
    ) -> Segments:
        """The table for a flat run of whole sequences. A sequence without the invocation is left to the base;
        with `where` (a name for each sequence) it is an error instead."""
        tables = [route._own(tokens, bounds, where) for route in self.apart()]
        return Segments(
            tuple(pair for t in tables for pair in t.global_adapters),
            tuple(row for t in tables for row in t.spans),
        )

    def apart(self) -> tuple["ActiveAdapters", ...]:
        """This adapter's own part of the route, then those of the others."""
        return (
            replace(self, beside=()),
            *(part for route in self.beside for part in route.apart()),
        )

    def _own(self, tokens: Tensor, bounds: Sequence[int], where: Sequence[str] | None) -> Segments:
        if not self.invocation:
            return Segments.on_all_tokens(self.adapter, self.weight)
        rows = []
        for number, start in enumerate(last_occurrences(tokens, bounds, self.invocation)):
            if start is not None:
                rows.append(Segment(start, bounds[number + 1], self.adapter, self.weight))
            elif where is not None:
                raise DataError(
                    "the invocation does not occur in this row",
                    where=where[number],
                    hint="--skip-bad-rows, or another --invocation",
                )
        return Segments(spans=tuple(rows))

    def row_segments(self) -> Segments:
        """The table for models that take rows of equal length: everywhere."""
        if any(route.invocation for route in self.apart()):
            raise DataError(
                "an activated adapter needs a text with an answer", hint="--method lora"
            )
        return Segments(tuple((route.adapter, route.weight) for route in self.apart()))

    def always_on(self) -> "ActiveAdapters":
        """The route that has every adapter act on all tokens, as if it had been invoked before them."""
        return ActiveAdapters.combine([replace(route, invocation=()) for route in self.apart()])

    def is_invoked(self, sequence: Sequence[int]) -> tuple[bool, ...]:
        """Whether each adapter acts on what follows `sequence`: this one, then those beside it."""
        return tuple(
            not route.invocation or last_start(sequence, route.invocation) is not None
            for route in self.apart()
        )

    def decode_segments(self, active: Sequence[tuple[bool, ...]]) -> Segments:
        """The table for one more token of each sequence, where `active` is what `invoked` said of each."""
        everywhere = [
            (route.adapter, route.weight) for route in self.apart() if not route.invocation
        ]
        rows = [
            Segment(i, i + 1, route.adapter, route.weight)
            for i, flags in enumerate(active)
            for route, on in zip(self.apart(), flags, strict=True)
            if on and route.invocation
        ]
        return Segments(tuple(everywhere), tuple(rows))
