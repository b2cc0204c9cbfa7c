"""Next-token objectives: supervised fine-tuning on the answers, and continued pretraining on whole texts.

    loss = - sum over labelled t of log p(token[t+1] | tokens up to t)   /   number of labelled t

The two differ only in which tokens carry a label.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from afina.base.model import Base
from afina.data.batches import FlatBatch, Sampler, flatten, pack
from afina.data.formats import Row
from afina.data.skipped import reasons, usable
from afina.data.template import Example, Renderer
from afina.errors import DataError
from afina.objective.task import Total, as_is, learned_rows
from afina.route.invocation import Route, last_start
from afina.segments import BASE


def choose(objective: str, rows: Sequence[Row]) -> str:
    """The objective meant by "auto": pretrain for plain text, sft for everything with an answer."""
    plain = [row.text is not None for row in rows]
    if objective == "auto":
        return "pretrain" if all(plain) else "sft"
    if objective == "sft" and any(plain):
        where = rows[plain.index(True)].where
        raise DataError("plain text has no answers to learn", where=where, hint="--objective pretrain")
    return objective


def make_examples(
    objective: str, renderer: Renderer, rows: Sequence[Row], skipped: list[str] | None, invocation: tuple[int, ...] = ()
) -> list[Example]:
    """Rows as labelled tokens. A row that cannot be used is an error, or is listed in `skipped` when that is given.

    With an `invocation`, only what follows its last occurrence carries labels: before it the adapter does not act.
    """

    def make(where: str, row: Row) -> list[Example]:
        made = renderer.texts(row, renderer.max_length) if objective == "pretrain" else [renderer.example(row)]
        return [after_invocation(example, invocation) for example in made] if invocation else made

    examples = [example for made in usable(((row.where, row) for row in rows), make, skipped) for example in made]
    if not examples:
        raise DataError("no row is left to learn from", why=f"skipped: {reasons(skipped or [])}")
    return examples


def after_invocation(example: Example, invocation: tuple[int, ...]) -> Example:
    """The example with labels only where an activated adapter acts; raises `DataError` where it never does."""
    start = last_start(example.tokens, invocation)
    if start is None:
        hint = "--invocation TEXT that stands in every row, or --skip-bad-rows"
        raise DataError("the invocation does not occur in this row", where=example.where, hint=hint)
    labels = [label and position > start for position, label in enumerate(example.labels)]
    if not any(labels):
        raise DataError("nothing to learn after the invocation", where=example.where, hint="--skip-bad-rows")
    return replace(example, labels=labels)


def batch_loss(base: Base, batch: FlatBatch, route: Route | None) -> Tensor:
    """Sum over the batch's labels of the cross-entropy in nats; divide by `batch.label_count` for the mean."""
    segments = BASE if route is None else route.segments(batch.tokens, batch.bounds)
    with base.board.route(segments):
        return base.loss(batch.tokens, batch.positions, batch.bounds, batch.labels)


@torch.no_grad()
def mean_loss(base: Base, examples: Sequence[Example], batch_tokens: int, route: Route | None) -> float:
    """Mean cross-entropy in nats over the labels of `examples`."""
    total, labels = 0.0, 0
    lengths = [len(example.tokens) for example in examples]
    for indices in pack(lengths, batch_tokens, range(len(examples))):
        batch = flatten([examples[i] for i in indices]).to(base.device)
        total += batch_loss(base, batch, route).item()
        labels += batch.label_count
    return total / labels


class LanguageTask:
    """Next-token learning on `train`, judged on `held`; batches hold about `batch_tokens` tokens."""

    def __init__(
        self, base: Base, train: list[Example], held: list[Example], batch_tokens: int, accumulate: int, seed: int
    ) -> None:
        self.base, self.train, self.held = base, train, held
        self._batch_tokens = batch_tokens
        self._sampler = Sampler(train, batch_tokens, accumulate, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return self._sampler.steps_per_epoch

    def step_batches(self, step: int) -> list[FlatBatch]:
        """The micro-batches of an optimizer step, on the base's device."""
        return [batch.to(self.base.device) for batch in self._sampler.step_batches(step)]

    def make_batch(self, rows: Sequence[Example], seed: int) -> FlatBatch:
        """Some rows end to end, on the base's device; nothing about them is random."""
        return flatten(rows).to(self.base.device)

    def step_rows(self, step: int) -> list[str]:
        """Names of the rows of an optimizer step."""
        return sorted({example.where for batch in self._sampler.step_examples(step) for example in batch})

    def count(self, batch: FlatBatch) -> int:
        """Labelled tokens."""
        return batch.label_count

    def size(self, batch: FlatBatch) -> int:
        """Tokens."""
        return len(batch.tokens)

    def loss(self, batch: FlatBatch, route: Route | None) -> Tensor:
        """Sum of the cross-entropy over the batch's labels, in nats."""
        return batch_loss(self.base, batch, route)

    def noted(self, total: Total = as_is) -> dict[str, float]:
        """Nothing: the loss says it all."""
        return {}

    def held_out_loss(self, route: Route | None) -> float:
        """Mean over the labels of the held-out rows, in nats."""
        return mean_loss(self.base, self.held, self._batch_tokens, route)

    def learned_loss(self, route: Route | None) -> float:
        """The same over as many of the rows that are learned from."""
        return mean_loss(self.base, learned_rows(self), self._batch_tokens, route)
