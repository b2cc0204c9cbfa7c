"""Reading sequences that begin alike, and reading them more than once: what is the same is computed once.

    batch          | p p p p i x a a a | p p p p i x b b | q q i x c c c |     two answers to a prompt, one to another; i: an
                                                                              invocation, x: the last token before an answer
    before         | p p p p | q q |            where no adapter acts: without gradients, once for policy and reference
    computed       | i x a a a | x b b | i x c c c |          by each of them; attention takes the rest from where it is

Losses are those of the whole batch: every token is what it would be there, whose products are shared, and whose attention is
not. What is shared ends before the first token that predicts an answer, so that each label stands once, in the same order.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from afina.base.flat import Before, Flat
from afina.base.model import Base
from afina.base.sharded import is_sharded
from afina.data.batches import FlatBatch
from afina.segments import BASE, Segments


@dataclass(frozen=True, eq=False)
class Lean:
    """What of a batch is computed: tokens, positions and labels (n), what attention needs to know, who acts, and `kept`,
    the places (n) of these tokens in the batch, ascending."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    flat: tuple[int, ...] | Flat
    table: Segments
    kept: Tensor | None = None

    def places(self, of: Sequence[int]) -> Tensor:
        """Where tokens of the batch, that are no beginnings, stand in what is computed."""
        wanted = torch.tensor(of, device=self.tokens.device)
        return wanted if self.kept is None else torch.searchsorted(self.kept, wanted)


class Reading:
    """A batch that will be read under each of `tables`, or some of them."""

    def __init__(self, base: Base, batch: FlatBatch, *tables: Segments) -> None:
        self.base, self.batch = base, batch
        self._shares = base.flat and base.gives_hidden
        # processes that share a base's blocks must all run it as often
        alone = self._shares and not is_sharded(base)
        self._cuts = _cuts(batch, tables) if alone else [0] * (len(batch.bounds) - 1)

    def lean(self, table: Segments) -> Lean:
        """The batch as it is to be computed under `table`."""
        batch = self.batch
        starts, begins = batch.bounds[:-1], self._begins(table)
        firsts = [start + n for start, (_, n) in zip(starts, begins, strict=True)]
        if firsts == list(starts):
            return Lean(batch.tokens, batch.positions, batch.labels, batch.bounds, table)
        spans = list(zip(firsts, batch.bounds[1:], strict=True))
        kept = [place for start, end in spans for place in range(start, end)]
        bounds = tuple(accumulate((end - start for start, end in spans), initial=0))
        before, stretches = self._before, self._stretches[1]
        pieces = []
        for number, (owner, n) in enumerate(begins):
            own, cut = before.length + bounds[number], self._cuts[number]
            made = [stretches[number]] if cut else []
            if n > cut:  # of the sequence that begins alike, after what is before both
                there = before.length + bounds[owner]
                made.append((there, there + n - cut))
            pieces.append((*made, (own, own + bounds[number + 1] - bounds[number])))
        index = torch.tensor(kept, device=batch.tokens.device)
        flat = Flat(bounds, pieces=tuple(pieces), before=before if before.length else None)
        return Lean(batch.tokens[index], batch.positions[index], batch.labels[index], flat, table.at(kept), index)

    def _begins(self, table: Segments) -> list[tuple[int, int]]:
        """Of each sequence: which one it begins like, and how many of its tokens are not its own."""
        begins, bounds = [], self.batch.bounds
        for number, (owner, n) in enumerate(self.batch.begins):
            cut = self._cuts[number]
            alike = 0
            if self._shares and owner != number and self._cuts[owner] == cut:
                alike = table.alike(bounds[number], bounds[owner], n)
            begins.append((owner, max(alike, cut)))
        return begins

    def sizes(self, table: Segments) -> tuple[int, int]:
        """How many tokens a forward under `table` computes, and how many come before, once for all forwards."""
        own = len(self.batch.tokens) - sum(n for _, n in self._begins(table))
        return own, sum(end - start for start, end in set(self._stretches[1]))

    @cached_property
    def _stretches(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The places of the beginnings on which nobody acts, each once, and which of them each sequence has."""
        tokens = self.batch.tokens.tolist() if any(self._cuts) else []
        places: dict[tuple[int, ...], tuple[int, int]] = {(): (0, 0)}
        kept: list[int] = []
        found = []
        for start, cut in zip(self.batch.bounds, self._cuts, strict=False):
            key = tuple(tokens[start : start + cut])
            if key not in places:
                places[key] = (len(kept), len(kept) + cut)
                kept += range(start, start + cut)
            found.append(places[key])
        return kept, found

    @cached_property
    @torch.no_grad()
    def _before(self) -> Before:
        """Keys and values of the beginnings on which nobody acts."""
        kept, stretches = self._stretches
        made, batch = Before(len(kept)), self.batch
        if kept:
            index = torch.tensor(kept, device=batch.tokens.device)
            bounds = (0, *sorted({end for _, end in stretches if end}))
            with self.base.board.route(BASE):
                self.base.hidden(batch.tokens[index], batch.positions[index], Flat(bounds, keep=made))
        return made


def _cuts(batch: FlatBatch, tables: Sequence[Segments]) -> list[int]:
    """How many tokens of each sequence come before anybody acts, under any of the tables; none where nobody ever acts."""
    if any(table.everywhere for table in tables) or not any(table.rows for table in tables):
        return [0] * (len(batch.bounds) - 1)
    acts = sorted(row.start for table in tables for row in table.rows)
    cuts = []
    for (start, _), (_, n) in zip(pairwise(batch.bounds), batch.begins, strict=True):
        at = bisect_left(acts, start)
        cuts.append(max(0, min(acts[at] - start if at < len(acts) else n, n)))
    return cuts
