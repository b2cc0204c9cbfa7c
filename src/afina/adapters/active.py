"""Active adapters of a sequence, and activated ones (aLoRA), active from their invocation on.

An activated adapter (Greenewald et al. 2025, arXiv 2504.12397) is active from the last occurrence
of its invocation tokens on:

    tokens   | the conversation so far ...  | <|assistant|> \\n | the completion ...
    adapter  | inactive: keys and values    | active from the first token of
             | are the base's own           | the invocation (as in PEFT)
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
    """Return where the last `invocation` starts in each packed sequence: index of a token, or None.

    One comparison over the packed batch, for any number of sequences; an occurrence that crosses a
    boundary does not count.
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
    """Return where the last `invocation` starts in one sequence, or None."""
    return last_occurrences(torch.tensor(tokens), (0, len(tokens)), invocation)[0]


@dataclass(frozen=True)
class ActiveAdapter:
    """One attached adapter that is active, on all tokens or from its invocation on.

    Attributes:
        adapter: its name in the layers.
        invocation: token ids from whose last occurrence on it is active; empty: on all tokens.
        weight: factor of its output.
    """

    adapter: str
    invocation: tuple[int, ...] = ()
    weight: float = 1.0

    def segments(
        self, tokens: Tensor, bounds: Sequence[int], where: Sequence[str] | None = None
    ) -> Segments:
        """Return its segments in a packed batch; arguments as in `ActiveAdapters.segments`."""
        if not self.invocation:
            return Segments.on_all_tokens(self.adapter, self.weight)
        spans = []
        for number, start in enumerate(last_occurrences(tokens, bounds, self.invocation)):
            if start is not None:
                spans.append(Segment(start, bounds[number + 1], self.adapter, self.weight))
            elif where is not None:
                raise DataError(
                    "the invocation does not occur in this row",
                    where=where[number],
                    hint="--skip-bad-rows, or another --invocation",
                )
        return Segments(spans=tuple(spans))

    def is_invoked(self, sequence: Sequence[int]) -> bool:
        """Return whether it is active on what follows `sequence`."""
        return not self.invocation or last_start(sequence, self.invocation) is not None


@dataclass(frozen=True)
class ActiveAdapters:
    """Adapters that are active together: their outputs are summed. Empty, hence false: the base."""

    adapters: tuple[ActiveAdapter, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.adapters)

    @classmethod
    def combine(cls, several: Sequence["ActiveAdapters"]) -> "ActiveAdapters":
        """Return all adapters of `several`."""
        return cls(tuple(adapter for active in several for adapter in active.adapters))

    def scaled(self, weight: float) -> "ActiveAdapters":
        """Return the first adapter with this weight, and those it was trained over with theirs."""
        first, *others = self.adapters
        return ActiveAdapters((replace(first, weight=weight), *others))

    def segments(
        self,
        tokens: Tensor,  # (num_tokens,)
        bounds: Sequence[int],
        where: Sequence[str] | None = None,
    ) -> Segments:
        """Return the segments of a packed batch of sequences.

        Args:
            bounds: cumulative sequence lengths, from 0.
            where: location of each sequence in the data, for the error.

        Raises:
            DataError: with `where`, a sequence does not contain the invocation; without it, the
                sequence is left to the base.
        """
        tables = [adapter.segments(tokens, bounds, where) for adapter in self.adapters]
        return Segments(
            tuple(pair for table in tables for pair in table.global_adapters),
            tuple(span for table in tables for span in table.spans),
        )

    def row_segments(self) -> Segments:
        """Return segments on all tokens, for models that take rows of equal length.

        Raises:
            DataError: an activated adapter, which needs a text with an answer.
        """
        if any(adapter.invocation for adapter in self.adapters):
            raise DataError(
                "an activated adapter needs a text with an answer", hint="--method lora"
            )
        return Segments(tuple((adapter.adapter, adapter.weight) for adapter in self.adapters))

    def always_on(self) -> "ActiveAdapters":
        """Return the same adapters, active on all tokens."""
        return ActiveAdapters(tuple(replace(adapter, invocation=()) for adapter in self.adapters))

    def is_invoked(self, sequence: Sequence[int]) -> tuple[bool, ...]:
        """Return for each adapter whether it is active on what follows `sequence`."""
        return tuple(adapter.is_invoked(sequence) for adapter in self.adapters)


BASE_ONLY = ActiveAdapters()
