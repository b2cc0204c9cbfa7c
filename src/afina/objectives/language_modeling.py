"""Next-token objectives: supervised fine-tuning on the answers, and continued pretraining on whole texts.

    loss = - sum over labelled t of log p(token[t+1] | tokens up to t)   /   number of labelled t

The two differ only in which tokens carry a label.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters, last_start
from afina.adapters.segments import NO_ADAPTERS
from afina.data.packing import BatchSampler, PackedBatch, group_by_length, pack_examples
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFTRow
from afina.data.table import parse_rows, summarize_skipped
from afina.errors import DataError
from afina.models.causal_lm import CausalLM
from afina.objectives.base import Total, no_reduce, train_sample


def infer_objective(objective: str, rows: Sequence[SFTRow]) -> str:
    """The objective meant by "auto": pretrain for plain text, sft for everything with an answer."""
    plain = [row.text is not None for row in rows]
    if objective == "auto":
        return "pretrain" if all(plain) else "sft"
    if objective == "sft" and any(plain):
        where = rows[plain.index(True)].where
        raise DataError(
            "plain text has no answers to learn", where=where, hint="--objective pretrain"
        )
    return objective


def tokenize_rows(
    objective: str,
    renderer: Renderer,
    rows: Sequence[SFTRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...] = (),
) -> list[Example]:
    """Rows as labelled tokens. A row that cannot be used is an error, or is listed in `skipped` when that is given.

    With an `invocation`, only what follows its last occurrence carries labels: before it the adapter does not act.
    """

    def make(where: str, row: SFTRow) -> list[Example]:
        made = (
            renderer.chunk_text(row, renderer.max_length)
            if objective == "pretrain"
            else [renderer.example(row)]
        )
        return (
            [mask_before_invocation(example, invocation) for example in made]
            if invocation
            else made
        )

    examples = [
        example
        for made in parse_rows(((row.where, row) for row in rows), make, skipped)
        for example in made
    ]
    if not examples:
        raise DataError(
            "no row is left to learn from", why=f"skipped: {summarize_skipped(skipped or [])}"
        )
    return examples


def mask_before_invocation(example: Example, invocation: tuple[int, ...]) -> Example:
    """The example with labels only where an activated adapter acts; raises `DataError` where it never does."""
    start = last_start(example.token_ids, invocation)
    if start is None:
        hint = "--invocation TEXT that stands in every row, or --skip-bad-rows"
        raise DataError("the invocation does not occur in this row", where=example.where, hint=hint)
    labels = [label and position > start for position, label in enumerate(example.loss_mask)]
    if not any(labels):
        raise DataError(
            "nothing to learn after the invocation", where=example.where, hint="--skip-bad-rows"
        )
    return replace(example, loss_mask=labels)


def batch_loss(base: CausalLM, batch: PackedBatch, route: ActiveAdapters | None) -> Tensor:
    """Sum over the batch's labels of the cross-entropy in nats; divide by `batch.label_count` for the mean."""
    segments = NO_ADAPTERS if route is None else route.segments(batch.token_ids, batch.cu_seqlens)
    with base.forward_context.use(segments):
        return base.loss(batch.token_ids, batch.positions, batch.cu_seqlens, batch.labels)


@torch.no_grad()
def mean_loss(
    base: CausalLM, examples: Sequence[Example], batch_tokens: int, route: ActiveAdapters | None
) -> float:
    """Mean cross-entropy in nats over the labels of `examples`."""
    total, labels = 0.0, 0
    lengths = [len(example.token_ids) for example in examples]
    for indices in group_by_length(lengths, batch_tokens, range(len(examples))):
        batch = pack_examples([examples[i] for i in indices]).to(base.device)
        total += batch_loss(base, batch, route).item()
        labels += batch.num_targets
    return total / labels


class LanguageModelingObjective:
    """Next-token learning on `train`, judged on `held`; batches hold about `batch_tokens` tokens."""

    def __init__(
        self,
        base: CausalLM,
        train: list[Example],
        held: list[Example],
        batch_tokens: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.base, self.train, self.eval_rows = base, train, held
        self._batch_tokens = batch_tokens
        self._sampler = BatchSampler(train, batch_tokens, accumulate, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return self._sampler.steps_per_epoch

    def step_batches(self, step: int) -> list[PackedBatch]:
        """The micro-batches of an optimizer step, on the base's device."""
        return [batch.to(self.base.device) for batch in self._sampler.step_batches(step)]

    def collate(self, rows: Sequence[Example], seed: int) -> PackedBatch:
        """Some rows end to end, on the base's device; nothing about them is random."""
        return pack_examples(rows).to(self.base.device)

    def row_locations(self, step: int) -> list[str]:
        """Names of the rows of an optimizer step."""
        return sorted(
            {example.where for batch in self._sampler.step_examples(step) for example in batch}
        )

    def num_targets(self, batch: PackedBatch) -> int:
        """Labelled tokens."""
        return batch.num_targets

    def num_tokens(self, batch: PackedBatch) -> int:
        """Tokens."""
        return len(batch.token_ids)

    def loss(self, batch: PackedBatch, route: ActiveAdapters | None) -> Tensor:
        """Sum of the cross-entropy over the batch's labels, in nats."""
        return batch_loss(self.base, batch, route)

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Nothing: the loss says it all."""
        return {}

    def eval_loss(self, route: ActiveAdapters | None) -> float:
        """Mean over the labels of the held-out rows, in nats."""
        return mean_loss(self.base, self.eval_rows, self._batch_tokens, route)

    def train_loss(self, route: ActiveAdapters | None) -> float:
        """The same over as many of the rows that are learned from."""
        return mean_loss(self.base, train_sample(self), self._batch_tokens, route)
