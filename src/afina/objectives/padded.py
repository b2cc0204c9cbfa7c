"""Objectives on padded batches of rows, for models that give one result per row or position.

The rows of a batch are padded to the longest; text encoders compute them without padding where they
can (`afina.models.packed_encoder`), and batches are bounded by what is computed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.adapters.active import ActiveAdapters
from afina.data.packing import (
    IGNORE_INDEX,
    BatchSampler,
    group_in_order,
    group_packed,
    group_padded,
)
from afina.models.classifier import Classifier
from afina.objectives.base import LossSum, Objective
from afina.objectives.workload import PassSize, StepWorkload, counted_steps

EVAL_BATCH_TOKENS = 2048  # of a batch of `afina eval`


@dataclass(frozen=True)
class PaddedBatch:
    """Model inputs and the class of each row or position; IGNORE_INDEX where there is none."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def shard(self, number: int, of: int) -> "PaddedBatch":
        """Return every `of`-th row from `number` on; a row without a target where none is left."""
        some = slice(number, None, of) if number < len(self.targets) else slice(1)
        targets = self.targets[some]
        if number >= len(self.targets):
            nothing = math.nan if targets.is_floating_point() else IGNORE_INDEX
            targets = torch.full_like(targets, nothing)
        return PaddedBatch({name: t[some] for name, t in self.inputs.items()}, targets)


class PaddedObjective(Objective):
    """Cross-entropy on padded batches of rows, for classification and masked language modeling.

    Args:
        base: The model.
        train: Training rows.
        eval_rows: Eval rows.
        batch_tokens: Most tokens of a batch, padding included where the model computes it.
        accumulate: Micro-batches per optimizer step.
        seed: Seed of the shuffle.
    """

    shares_base = False
    renders_chats = False
    planned_by_trial = True
    base: Classifier

    def __init__(
        self,
        base: Classifier,
        train: Sequence[Any],
        eval_rows: Sequence[Any],
        batch_tokens: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.base, self.train, self.eval_rows = base, train, eval_rows
        self._batch_tokens, self._seed = batch_tokens, seed
        lengths = [self.length(row) for row in train]
        group = group_padded if base.packed is None else group_packed
        self._sampler = BatchSampler(train, batch_tokens, accumulate, seed, lengths, group)

    def length(self, row: Any) -> int:
        """Return the tokens of a row; a patch of 16 x 16 pixels counts as one."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in the first pass over the rows; others can have one more or less."""
        return self._sampler.steps_per_epoch

    def step_batches(self, step: int) -> list[PaddedBatch]:
        """Return the micro-batches of an optimizer step."""
        return [
            self.collate(rows, hash((self._seed, step, number)))
            for number, rows in enumerate(self._sampler.step_examples(step))
        ]

    def rows_of_step(self, step: int) -> list[Any]:
        """Return the rows of an optimizer step."""
        return [row for rows in self._sampler.step_examples(step) for row in rows]

    def num_computed(self, rows: Sequence[Any]) -> int:
        """Return the tokens of a batch that the model computes, padding included where it does."""
        lengths = [self.length(row) for row in rows]
        return sum(lengths) if self.base.packed else max(lengths) * len(lengths)

    def step_workload(self) -> StepWorkload:
        """Return the sizes of the first epoch's batches."""
        passes = [
            [
                PassSize(self.num_computed(rows), 0, len(rows), [self.length(row) for row in rows])
                for rows in self._sampler.step_examples(step)
            ]
            for step in counted_steps(self.steps_per_epoch)
        ]
        return StepWorkload(passes, eval_tokens=float(sum(map(self.length, self.eval_rows))))

    def row_locations(self, step: int) -> list[str]:
        """Return `file:line` of the rows of an optimizer step."""
        return sorted(row.where for row in self.rows_of_step(step))

    def num_targets(self, batch: PaddedBatch) -> int:
        """Return the number of rows, or positions, with a target."""
        return int((batch.targets != IGNORE_INDEX).sum())

    def num_tokens(self, batch: PaddedBatch) -> int:
        """Return the number of tokens, or images, that pass through the model."""
        if "attention_mask" in batch.inputs:
            return int(batch.inputs["attention_mask"].sum())
        return len(batch.inputs["pixel_values"])

    def logits(self, batch: PaddedBatch, active: ActiveAdapters) -> Tensor:
        """Return the scores `(..., num_classes)` of a batch."""
        with self.base.forward_context.use(active.row_segments()):
            return self.base.logits(batch.inputs)

    def loss(self, batch: PaddedBatch, active: ActiveAdapters) -> Tensor:
        """Return the sum of the cross-entropy over the targets of a batch, in nats."""
        logits = self.logits(batch, active)
        return F.cross_entropy(
            logits.flatten(0, -2),
            batch.targets.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )

    def batches(self, rows: Sequence[Any]) -> Iterator[PaddedBatch]:
        """Yield some rows in batches, in their order."""
        lengths = [self.length(row) for row in rows]
        for indices in group_in_order(lengths, self._batch_tokens, self.base.packed is None):
            yield self.collate([rows[index] for index in indices], indices[0])

    @torch.no_grad()
    def mean_loss(self, rows: Sequence[Any], active: ActiveAdapters) -> float:
        """Return the mean loss of some rows, in nats per target."""
        return LossSum.mean(
            [
                LossSum(self.loss(batch, active).item(), self.num_targets(batch))
                for batch in self.batches(rows)
            ]
        )
