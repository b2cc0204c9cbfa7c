"""Batches of preferences: completions packed, the chosen ones first."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afina.data.packing import PackedBatch, balanced_partition, pack_examples
from afina.data.renderer import Example
from afina.objectives.preference_data import PreferenceExample


@dataclass
class KLSamples:
    """The mismatched completions of an optimizer step, and z once it is known."""

    examples: list[Example]
    kl_baseline: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[PreferenceExample]) -> "KLSamples":
        """Return the mismatched completions of some rows."""
        return cls([row.mismatched for row in rows if row.mismatched is not None])


@dataclass(frozen=True, eq=False)
class PreferenceBatch:
    """Packed completions; `chosen` and `rejected` are indices of the sequences of `flat`."""

    flat: PackedBatch
    examples: tuple[Example, ...]
    chosen: Tensor
    rejected: Tensor
    rows: int
    mismatched: KLSamples

    def shard(self, number: int, of: int) -> "PreferenceBatch":
        """Return one of `of` parts of about as many tokens; one without rows where none is left.

        z stays that of all rows of the step: each part computes it from the same completions.
        """
        chosen, rejected = self.chosen.tolist(), self.rejected.tolist()
        bounds = self.flat.cu_seqlens
        is_paired = self.rows == len(chosen) == len(rejected)
        rows = (
            list(zip(chosen, rejected, strict=True))
            if is_paired
            else [(n,) for n in (*chosen, *rejected)]
        )
        sizes = [sum(bounds[n + 1] - bounds[n] for n in row) for row in rows]
        mine = [rows[n] for n in balanced_partition(sizes, of)[number]]
        kept = {n for row in mine for n in row}
        better, worse = [n for n in chosen if n in kept], [n for n in rejected if n in kept]
        sequences = [*better, *worse] or [0]
        numbers = torch.arange(len(kept), device=self.chosen.device)
        return PreferenceBatch(
            self.flat.select(sequences),
            tuple(self.examples[n] for n in sequences),
            numbers[: len(better)],
            numbers[len(better) :],
            len(mine),
            self.mismatched,
        )


def pack_preferences(
    rows: Sequence[PreferenceExample], mismatched: KLSamples, device: torch.device
) -> PreferenceBatch:
    """Return a batch of rows: all chosen completions, then all rejected ones."""
    chosen = [row.chosen for row in rows if row.chosen]
    rejected = [row.rejected for row in rows if row.rejected]
    every = [*chosen, *rejected]
    numbers = torch.arange(len(every), device=device)
    return PreferenceBatch(
        pack_examples(every).to(device),
        tuple(every),
        numbers[: len(chosen)],
        numbers[len(chosen) :],
        len(rows),
        mismatched,
    )
