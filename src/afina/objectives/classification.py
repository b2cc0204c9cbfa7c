"""Classification: one answer a row. And masked tokens, the way to pretrain an encoder.

    loss = - sum over rows of log p(class | row)   /   rows
    masked: the same over the positions that were hidden (15%; of these 80% by the mask, 10% by a random token)

Devlin et al. 2018, arXiv 1810.04805, for the masking.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.adapters.active import ActiveAdapters
from afina.adapters.segments import NO_ADAPTERS
from afina.data.images import open_image
from afina.data.schemas import LabeledRow
from afina.data.table import parse_rows
from afina.errors import DataError
from afina.models.classifier import Classifier
from afina.objectives.base import Total, no_reduce

MASKED_SHARE = 0.15
IGNORE = -100
WINDOW = 32  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class PaddedBatch:
    """Model inputs and, for each row or position, the class to find (IGNORE where there is none)."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def shard(self, number: int, of: int) -> "PaddedBatch":
        """Every `of`-th row from `number` on; a row without a target where none is left."""
        if number < len(self.targets):
            return PaddedBatch(
                {name: t[number::of] for name, t in self.inputs.items()}, self.targets[number::of]
            )
        return PaddedBatch(
            {name: t[:1] for name, t in self.inputs.items()},
            torch.full_like(self.targets[:1], IGNORE),
        )


def batch_indices(lengths: Sequence[int], rows: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each batch of an epoch, shuffled; one may be smaller. Rows of like length share a batch.

    They are sorted within windows of some batches only, so that what meets in a batch stays mostly chance. On phrases
    of 1 to 50 words (SST-2) padding falls from 70% of the tokens to 7%.
    """
    rng, count = random.Random(seed + epoch), len(lengths)
    order = rng.sample(range(count), count)
    batches = []
    for start in range(0, count, rows * WINDOW):
        window = sorted(order[start : start + rows * WINDOW], key=lambda i: lengths[i])
        batches += [window[at : at + rows] for at in range(0, len(window), rows)]
    rng.shuffle(batches)
    return batches


class PaddedObjective:
    """What classification and masking share: batches of rows, a cross-entropy, held-out rows. See `Task`."""

    def __init__(
        self,
        base: Classifier,
        train: Sequence[Any],
        held: Sequence[Any],
        rows: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.base, self.train, self.eval_rows = base, train, held
        self._rows, self._accumulate, self._seed = max(1, min(rows, len(train))), accumulate, seed
        self._epoch: tuple[int, list[list[int]]] | None = None

    def collate(self, rows: Sequence[Any], seed: int) -> PaddedBatch:
        """Inputs and targets of some rows; `seed` decides what is random about them."""
        raise TypeError(f"{type(self).__name__} must say what a batch is")

    def length(self, row: Any) -> int:
        """Tokens of a row, by which it finds its batch; the same for all pictures."""
        raise TypeError(f"{type(self).__name__} must say how long a row is")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return -(-len(self.train) // (self._rows * self._accumulate))

    def _indices(self, step: int) -> list[list[int]]:
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:  # sorted once an epoch, not once a step
            lengths = [self.length(row) for row in self.train]
            self._epoch = epoch, batch_indices(lengths, self._rows, self._seed, epoch)
        batches = self._epoch[1]
        return batches[within * self._accumulate : (within + 1) * self._accumulate]

    def step_batches(self, step: int) -> list[PaddedBatch]:
        """The micro-batches of an optimizer step."""
        return [
            self.collate([self.train[i] for i in indices], hash((self._seed, step, number)))
            for number, indices in enumerate(self._indices(step))
        ]

    def row_locations(self, step: int) -> list[str]:
        """Names of the rows of an optimizer step."""
        return sorted(self.train[i].where for indices in self._indices(step) for i in indices)

    def num_targets(self, batch: PaddedBatch) -> int:
        """Rows, or positions, with a target."""
        return int((batch.targets != IGNORE).sum())

    def num_tokens(self, batch: PaddedBatch) -> int:
        """Tokens, or pictures, that pass through the model."""
        inputs = batch.inputs
        return (
            int(inputs["attention_mask"].sum())
            if "attention_mask" in inputs
            else len(inputs["pixel_values"])
        )

    def logits(self, batch: PaddedBatch, route: ActiveAdapters | None) -> Tensor:
        """Scores (..., classes) of a batch under `route`."""
        with self.base.forward_context.use(NO_ADAPTERS if route is None else route.row_segments()):
            return self.base.logits(batch.inputs)

    def loss(self, batch: PaddedBatch, route: ActiveAdapters | None) -> Tensor:
        """Sum of the cross-entropy over the targets of a batch."""
        logits = self.logits(batch, route)
        return F.cross_entropy(
            logits.flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    @torch.no_grad()
    def _mean(self, rows: Sequence[Any], route: ActiveAdapters | None) -> float:
        total, count = 0.0, 0
        for start in range(0, len(rows), self._rows):
            batch = self.collate(rows[start : start + self._rows], start)
            total, count = total + self.loss(batch, route).item(), count + self.num_targets(batch)
        return total / max(1, count)

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Nothing: the loss says it all."""
        return {}

    def eval_loss(self, route: ActiveAdapters | None) -> float:
        """Mean over the held-out rows, in nats."""
        return self._mean(self.eval_rows, route)

    def train_loss(self, route: ActiveAdapters | None) -> float:
        """The same over as many of the rows that are learned from."""
        some = self.train[:: max(1, len(self.train) // max(1, len(self.eval_rows)))][
            : len(self.eval_rows)
        ]
        return self._mean(some, route)


@dataclass(frozen=True)
class ClassificationExample:
    """A row ready for the model: tokens or a shrunk picture, and the number of its class."""

    where: str
    content: Any
    target: int


class ClassificationObjective(PaddedObjective):
    """One class a row."""

    def length(self, row: ClassificationExample) -> int:
        """Tokens; pictures are all alike."""
        return len(row.content) if isinstance(row.content, list) else 0

    def collate(self, rows: Sequence[ClassificationExample], seed: int) -> PaddedBatch:
        """Padded tokens or stacked pixels, and the classes (rows)."""
        targets = torch.tensor([row.target for row in rows], device=self.base.device)
        return PaddedBatch(self.base.batch([row.content for row in rows]), targets)

    @torch.no_grad()
    def predictions(
        self, rows: Sequence[ClassificationExample], route: ActiveAdapters | None
    ) -> list[int]:
        """The likeliest class of each row."""
        found: list[int] = []
        for start in range(0, len(rows), self._rows):
            found += (
                self.logits(self.collate(rows[start : start + self._rows], 0), route)
                .argmax(-1)
                .tolist()
            )
        return found


@dataclass(frozen=True)
class TokenizedText:
    """A piece of text as tokens, special ones at both ends."""

    where: str
    token_ids: list[int]


class MaskedLMObjective(PaddedObjective):
    """Hidden tokens to be found. Held-out rows are masked the same way each time."""

    def length(self, row: TokenizedText) -> int:
        """Tokens."""
        return len(row.token_ids)

    def collate(self, rows: Sequence[TokenizedText], seed: int) -> PaddedBatch:
        """Tokens with some hidden, and what they were (rows, longest)."""
        inputs = self.base.batch([row.token_ids for row in rows])
        tokenizer = self.base.tokenizer
        assert tokenizer is not None
        tokens, generator = inputs["input_ids"], torch.Generator().manual_seed(seed % (1 << 62))
        special = torch.isin(tokens.cpu(), torch.tensor(tokenizer.all_special_ids))
        hidden = (torch.rand(tokens.shape, generator=generator) < MASKED_SHARE) & ~special
        if not hidden.any():
            hidden[0, 1] = True
        fate = torch.rand(tokens.shape, generator=generator)
        random_tokens = torch.randint(len(tokenizer), tokens.shape, generator=generator)
        shown = torch.where(
            fate < 0.8,
            tokenizer.mask_token_id,
            torch.where(fate < 0.9, random_tokens, tokens.cpu()),
        )
        targets = torch.where(hidden, tokens.cpu(), IGNORE).to(tokens.device)
        return PaddedBatch(
            inputs | {"input_ids": torch.where(hidden, shown, tokens.cpu()).to(tokens.device)},
            targets,
        )


def tokenize_labeled_rows(
    base: Classifier, rows: Sequence[LabeledRow], max_length: int, skipped: list[str] | None
) -> list[ClassificationExample]:
    """Labelled rows as tokens or pixels; one that cannot be used is an error, or is listed in `skipped`."""
    numbers = {label: number for number, label in enumerate(base.labels)}

    def make(where: str, row: LabeledRow) -> ClassificationExample:
        return ClassificationExample(
            where, encode_input(base, row.content, max_length, where), _number(row, numbers)
        )

    made = parse_rows(((row.where, row) for row in rows), make, skipped)
    if not made:
        raise DataError("no row is left")
    return made


def _number(row: LabeledRow, numbers: dict[str, int]) -> int:
    if row.label not in numbers:
        raise DataError(
            f"class {row.label!r} was not among the training rows",
            where=row.where,
            why=f"known: {', '.join(numbers)}",
        )
    return numbers[row.label]


def encode_input(base: Classifier, content: str | bytes, max_length: int, where: str) -> Any:
    """A text as tokens, the bytes of a picture as one that is shrunk; raises `DataError` where it cannot be read."""
    if base.images is not None:
        if isinstance(content, str):
            raise DataError("this model reads pictures, and here is a text", where=where)
        return base.images.resize(open_image(content, where))
    if isinstance(content, bytes):
        raise DataError("this model reads text, and here is a picture", where=where)
    assert base.tokenizer is not None
    tokens = base.tokenizer(content, verbose=False)["input_ids"]
    if len(tokens) > max_length:
        hint = "raise --max-length, shorten the row, or leave it out with --skip-bad-rows"
        raise DataError(
            f"{len(tokens):,} tokens, more than the {max_length:,} allowed", where=where, hint=hint
        )
    return tokens


def chunk_texts(base: Classifier, rows: Sequence[Any], max_length: int) -> list[TokenizedText]:
    """Plain text cut into pieces of at most `max_length` tokens, with the special tokens that the encoder expects."""
    tokenizer = base.tokenizer
    assert tokenizer is not None
    if tokenizer.mask_token_id is None:
        raise DataError(
            "this model's tokenizer has no mask token",
            hint="--objective pretrain is for models that write on",
        )
    first, last = [
        [t] if t is not None else [] for t in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    ]
    pieces = []
    for row in rows:
        tokens = tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(tokens), max_length - 2):
            pieces.append(
                TokenizedText(row.where, [*first, *tokens[start : start + max_length - 2], *last])
            )
    return [piece for piece in pieces if len(piece.token_ids) > 2]
