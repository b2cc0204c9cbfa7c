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

from afina.adapters.segments import NO_ADAPTERS, Segments
from afina.data.packing import PackedBatch
from afina.models.causal_lm import CausalLM
from afina.models.fsdp import is_sharded
from afina.models.packed_attention import AttentionMetadata, PrefixKV


@dataclass(frozen=True, eq=False)
class ForwardInputs:
    """What of a batch is computed: tokens, positions and labels (n), what attention needs to know, who acts, and `kept`,
    the places (n) of these tokens in the batch, ascending."""

    token_ids: Tensor
    positions: Tensor
    labels: Tensor
    flat: tuple[int, ...] | AttentionMetadata
    table: Segments
    kept: Tensor | None = None

    def positions_of(self, of: Sequence[int]) -> Tensor:
        """Where tokens of the batch, that are no beginnings, stand in what is computed."""
        wanted = torch.tensor(of, device=self.token_ids.device)
        return wanted if self.kept is None else torch.searchsorted(self.kept, wanted)


class SharedPrefixBatch:
    """A batch that will be read under each of `tables`, or some of them."""

    def __init__(self, base: CausalLM, batch: PackedBatch, *tables: Segments) -> None:
        self.base, self.batch = base, batch
        self._shares = base.supports_packing and base.has_hidden_states
        # processes that share a base's blocks must all run it as often
        alone = self._shares and not is_sharded(base)
        self._cuts = _cuts(batch, tables) if alone else [0] * (len(batch.cu_seqlens) - 1)

    def inputs_for(self, table: Segments) -> ForwardInputs:
        """The batch as it is to be computed under `table`."""
        batch = self.batch
        starts, begins = batch.cu_seqlens[:-1], self._begins(table)
        firsts = [start + n for start, (_, n) in zip(starts, begins, strict=True)]
        if firsts == list(starts):
            return ForwardInputs(
                batch.token_ids, batch.positions, batch.labels, batch.cu_seqlens, table
            )
        spans = list(zip(firsts, batch.cu_seqlens[1:], strict=True))
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
        index = torch.tensor(kept, device=batch.token_ids.device)
        flat = AttentionMetadata(
            bounds, sequence_spans=tuple(pieces), before=before if before.length else None
        )
        return ForwardInputs(
            batch.token_ids[index],
            batch.positions[index],
            batch.labels[index],
            flat,
            table.select(kept),
            index,
        )

    def _begins(self, table: Segments) -> list[tuple[int, int]]:
        """Of each sequence: which one it begins like, and how many of its tokens are not its own."""
        begins, bounds = [], self.batch.cu_seqlens
        for number, (owner, n) in enumerate(self.batch.shared_prefixes):
            cut = self._cuts[number]
            alike = 0
            if self._shares and owner != number and self._cuts[owner] == cut:
                alike = table.common_prefix_length(bounds[number], bounds[owner], n)
            begins.append((owner, max(alike, cut)))
        return begins

    def num_computed_tokens(self, table: Segments) -> tuple[int, int]:
        """How many tokens a forward under `table` computes, and how many come before, once for all forwards."""
        own = len(self.batch.token_ids) - sum(n for _, n in self._begins(table))
        return own, sum(end - start for start, end in set(self._stretches[1]))

    @cached_property
    def _stretches(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The places of the beginnings on which nobody acts, each once, and which of them each sequence has."""
        tokens = self.batch.token_ids.tolist() if any(self._cuts) else []
        places: dict[tuple[int, ...], tuple[int, int]] = {(): (0, 0)}
        kept: list[int] = []
        found = []
        for start, cut in zip(self.batch.cu_seqlens, self._cuts, strict=False):
            key = tuple(tokens[start : start + cut])
            if key not in places:
                places[key] = (len(kept), len(kept) + cut)
                kept += range(start, start + cut)
            found.append(places[key])
        return kept, found

    @cached_property
    @torch.no_grad()
    def _before(self) -> PrefixKV:
        """Keys and values of the beginnings on which nobody acts."""
        kept, stretches = self._stretches
        made, batch = PrefixKV(len(kept)), self.batch
        if kept:
            index = torch.tensor(kept, device=batch.token_ids.device)
            bounds = (0, *sorted({end for _, end in stretches if end}))
            with self.base.forward_context.use(NO_ADAPTERS):
                self.base.hidden_states(
                    batch.token_ids[index],
                    batch.positions[index],
                    AttentionMetadata(bounds, captured_kv=made),
                )
        return made


def _cuts(batch: PackedBatch, tables: Sequence[Segments]) -> list[int]:
    """How many tokens of each sequence come before anybody acts, under any of the tables; none where nobody ever acts."""
    if any(table.global_adapters for table in tables) or not any(table.spans for table in tables):
        return [0] * (len(batch.cu_seqlens) - 1)
    acts = sorted(row.start for table in tables for row in table.spans)
    cuts = []
    for (start, _), (_, n) in zip(pairwise(batch.cu_seqlens), batch.shared_prefixes, strict=True):
        at = bisect_left(acts, start)
        cuts.append(max(0, min(acts[at] - start if at < len(acts) else n, n)))
    return cuts
