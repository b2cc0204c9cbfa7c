"""Forward passes over sequences with common prefixes: what they share is computed once.

    batch    | p p p p i x a a a | p p p p i x b b | q q i x c c c |   a, b: completions of p
    prefix   | p p p p | q q |                    no adapter is active: no gradient, and one pass
                                                  for policy and reference
    inputs   | i x a a a | x b b | i x c c c |    computed by each of them, with attention to the
                                                  keys and values of what comes before

Here i is an invocation and x the last token of a prompt. Losses are those of the complete batch.
A shared part ends before the first token that predicts a completion, so that each target occurs
once, in the same order.
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
    """Model inputs of a batch after shared prefixes are removed.

    Token ids, positions and labels are `(n,)`; `flat` has cumulative lengths or attention metadata,
    `table` the adapter segments, `kept` `(n,)` the ascending batch indices of these tokens; None
    where all are kept.
    """

    token_ids: Tensor
    positions: Tensor
    labels: Tensor
    flat: tuple[int, ...] | AttentionMetadata
    table: Segments
    kept: Tensor | None = None

    def positions_of(self, of: Sequence[int]) -> Tensor:
        """Return the indices, among the inputs, of tokens of the batch outside shared prefixes."""
        wanted = torch.tensor(of, device=self.token_ids.device)
        return wanted if self.kept is None else torch.searchsorted(self.kept, wanted)


class SharedPrefixBatch:
    """A batch for forward passes under some of `tables`, the segments of policy and reference."""

    def __init__(self, base: CausalLM, batch: PackedBatch, *tables: Segments) -> None:
        self.base, self.batch = base, batch
        self._shares = base.supports_packing and base.has_hidden_states
        # FSDP: all processes must run the layers of a sharded base equally often
        alone = self._shares and not is_sharded(base)
        self._cuts = _cuts(batch, tables) if alone else [0] * (len(batch.cu_seqlens) - 1)

    def inputs_for(self, table: Segments) -> ForwardInputs:
        """Return the model inputs under `table`."""
        batch = self.batch
        starts, begins = batch.cu_seqlens[:-1], self._begins(table)
        firsts = [start + n for start, (_, n) in zip(starts, begins, strict=True)]
        if firsts == list(starts):
            return ForwardInputs(
                batch.token_ids, batch.positions, batch.labels, batch.cu_seqlens, table
            )
        spans = list(zip(firsts, batch.cu_seqlens[1:], strict=True))
        kept = [index for start, end in spans for index in range(start, end)]
        bounds = tuple(accumulate((end - start for start, end in spans), initial=0))
        before, stretches = self._before, self._stretches[1]
        pieces = []
        for number, (owner, n) in enumerate(begins):
            own, cut = before.length + bounds[number], self._cuts[number]
            parts = [stretches[number]] if cut else []
            if n > cut:  # what it shares with its owner after the adapter-free prefix
                there = before.length + bounds[owner]
                parts.append((there, there + n - cut))
            pieces.append((*parts, (own, own + bounds[number + 1] - bounds[number])))
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
        """Return (owner, length) of each sequence: whose prefix it shares, and its tokens."""
        begins, bounds = [], self.batch.cu_seqlens
        for number, (owner, n) in enumerate(self.batch.shared_prefixes):
            cut = self._cuts[number]
            alike = 0
            if self._shares and owner != number and self._cuts[owner] == cut:
                alike = table.common_prefix_length(bounds[number], bounds[owner], n)
            begins.append((owner, max(alike, cut)))
        return begins

    def num_computed_tokens(self, table: Segments) -> tuple[int, int]:
        """Return the tokens that a pass under `table` computes, and those of the common prefix."""
        own = len(self.batch.token_ids) - sum(n for _, n in self._begins(table))
        return own, sum(end - start for start, end in set(self._stretches[1]))

    @cached_property
    def _stretches(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Return batch indices of adapter-free prefixes, each once, and each sequence's span."""
        tokens = self.batch.token_ids.tolist() if any(self._cuts) else []
        stretches: dict[tuple[int, ...], tuple[int, int]] = {(): (0, 0)}
        kept: list[int] = []
        found = []
        for start, cut in zip(self.batch.cu_seqlens, self._cuts, strict=False):
            key = tuple(tokens[start : start + cut])
            if key not in stretches:
                stretches[key] = (len(kept), len(kept) + cut)
                kept += range(start, start + cut)
            found.append(stretches[key])
        return kept, found

    @cached_property
    @torch.no_grad()
    def _before(self) -> PrefixKV:
        """Keys and values of the adapter-free prefixes."""
        kept, stretches = self._stretches
        parts, batch = PrefixKV(len(kept)), self.batch
        if kept:
            index = torch.tensor(kept, device=batch.token_ids.device)
            bounds = (0, *sorted({end for _, end in stretches if end}))
            with self.base.forward_context.use(NO_ADAPTERS):
                self.base.hidden_states(
                    batch.token_ids[index],
                    batch.positions[index],
                    AttentionMetadata(bounds, captured_kv=parts),
                )
        return parts


def _cuts(batch: PackedBatch, tables: Sequence[Segments]) -> list[int]:
    """Return the tokens of each sequence before the first active adapter of any table.

    All are 0 where no adapter is ever active, or one on all tokens.
    """
    if any(table.global_adapters for table in tables) or not any(table.spans for table in tables):
        return [0] * (len(batch.cu_seqlens) - 1)
    starts = sorted(row.start for table in tables for row in table.spans)
    cuts = []
    for (start, _), (_, n) in zip(pairwise(batch.cu_seqlens), batch.shared_prefixes, strict=True):
        at = bisect_left(starts, start)
        cuts.append(max(0, min(starts[at] - start if at < len(starts) else n, n)))
    return cuts
