"""Examples become flat batches: one run of tokens without padding, and the boundaries of its sequences.

    tokens     | a a a a a | b b b | c c c c c c |       bounds (0, 5, 8, 14)
    positions  | 0 1 2 3 4 | 0 1 2 | 0 1 2 3 4 5 |
    labels     | the token that comes next, or -100 where it is not learned; never over a boundary

Which rows share a batch is a pure function of lengths, seed and step.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from afina.data.renderer import Example
from afina.errors import DataError

Piece = TypeVar("Piece")
IGNORE_INDEX = -100
WINDOW = (
    64  # sequences looked at to fill the rest of a batch: order stays nearly that of the shuffle
)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences one after another: int64 `tokens`, `positions` and `labels` of shape (T,); `bounds` (0, ..., T)."""

    token_ids: Tensor
    positions: Tensor
    labels: Tensor
    cu_seqlens: tuple[int, ...]

    @cached_property
    def num_targets(self) -> int:
        """How many tokens are learned."""
        return int((self.labels != IGNORE_INDEX).sum())

    @cached_property
    def shared_prefixes(self) -> tuple[tuple[int, int], ...]:
        """Of each sequence: the first one that has the same tokens before its first label, and how many these are.

        The token that predicts the first one learned, or the last token, is not among them.
        """
        tokens, labels, found = self.token_ids.tolist(), self.labels.tolist(), []
        owners: dict[tuple[int, ...], int] = {}
        for number, (start, end) in enumerate(pairwise(self.cu_seqlens)):
            learned = next(
                (place for place in range(start, end) if labels[place] != IGNORE_INDEX), end - 1
            )
            owner = owners.setdefault(tuple(tokens[start:learned]), number)
            found.append((owner, learned - start))
        return tuple(found)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        count = self.num_targets  # counted here, so that nobody waits for the device to count
        moved = PackedBatch(
            self.token_ids.to(device),
            self.positions.to(device),
            self.labels.to(device),
            self.cu_seqlens,
        )
        moved.__dict__["num_targets"] = count
        return moved

    def shard(self, number: int, of: int) -> "PackedBatch":
        """Some of the sequences: one of `of` parts of about as many tokens; one without labels where none is left for it."""
        mine = balanced_partition([end - start for start, end in pairwise(self.cu_seqlens)], of)[
            number
        ]
        if mine:
            return self.select(mine)
        one = self.select([0])
        return PackedBatch(
            one.token_ids, one.positions, torch.full_like(one.labels, IGNORE_INDEX), one.cu_seqlens
        )

    def select(self, sequences: Sequence[int]) -> "PackedBatch":
        """These sequences, in this order."""
        spans = [(self.cu_seqlens[n], self.cu_seqlens[n + 1]) for n in sequences]
        places = torch.cat([torch.arange(start, end) for start, end in spans]).to(
            self.token_ids.device
        )
        bounds = tuple(accumulate((end - start for start, end in spans), initial=0))
        return PackedBatch(
            self.token_ids[places], self.positions[places], self.labels[places], bounds
        )


def balanced_partition(sizes: Sequence[int], of: int) -> list[list[int]]:
    """The numbers of some things in `of` lists of about equal size: the largest first, each to the lightest list."""
    parts: list[list[int]] = [[] for _ in range(of)]
    loads = [0] * of
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        lightest = loads.index(min(loads))
        parts[lightest].append(number)
        loads[lightest] += sizes[number]
    return [sorted(part) for part in parts]


def pack_examples(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end; labels are shifted, so that labels[t] is the token to predict at t."""
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        tokens += example.token_ids
        positions += range(len(example.token_ids))
        following = zip(example.token_ids[1:], example.loss_mask[1:], strict=True)
        labels += [token if learned else IGNORE_INDEX for token, learned in following]
        labels.append(IGNORE_INDEX)
    bounds = tuple(accumulate((len(example.token_ids) for example in examples), initial=0))
    flat_tokens, flat_positions, flat_labels = (
        torch.tensor(p, dtype=torch.int64) for p in (tokens, positions, labels)
    )
    return PackedBatch(flat_tokens, flat_positions, flat_labels, bounds)


def group_by_length(
    lengths: Sequence[int], batch_tokens: int, order: Sequence[int]
) -> list[list[int]]:
    """Indices in batches of at most `batch_tokens`, going through `order` and filling gaps from the next few.

    Every index comes once; a sequence longer than `batch_tokens` has a batch of its own.
    """
    rest = iter(order)
    window = list(islice(rest, WINDOW))
    batches = []
    while window:
        batch = [window.pop(0)]
        window += islice(rest, 1)
        room, at = batch_tokens - lengths[batch[0]], 0
        while at < len(window) and room > 0:
            if lengths[window[at]] > room:
                at += 1
                continue
            batch.append(window.pop(at))
            window += islice(rest, 1)
            room -= lengths[batch[-1]]
        batches.append(batch)
    return batches


class BatchSampler:
    """The micro-batches of every optimizer step: a pure function of (examples, seed, step), so a run can resume.

    Epochs follow one another, each shuffled by seed + epoch and packed anew; the last step of an epoch may have
    fewer than `accumulate` micro-batches.
    """

    def __init__(
        self, examples: Sequence[Example], batch_tokens: int, accumulate: int, seed: int
    ) -> None:
        if not examples:
            raise DataError("there are no examples to train on")
        self._examples, self._batch_tokens, self._accumulate, self._seed = (
            examples,
            batch_tokens,
            accumulate,
            seed,
        )
        self._lengths = [len(example.token_ids) for example in examples]
        self._first_steps = [0]  # the step at which each epoch begins, as far as is known
        self._plan: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch; packing may give others one more or less."""
        return self._start(1)

    def step_batches(self, step: int) -> list[PackedBatch]:
        """The micro-batches of optimizer step `step`, counted from 0."""
        return [pack_examples(examples) for examples in self.step_examples(step)]

    def step_examples(self, step: int) -> list[list[Example]]:
        """The examples of each micro-batch of optimizer step `step`."""
        epoch = 0
        while step >= self._start(epoch + 1):
            epoch += 1
        first = (step - self._start(epoch)) * self._accumulate
        chosen = self._batches(epoch)[first : first + self._accumulate]
        return [[self._examples[index] for index in batch] for batch in chosen]

    def _start(self, epoch: int) -> int:
        while len(self._first_steps) <= epoch:
            self._first_steps.append(
                self._first_steps[-1] + self._steps(len(self._first_steps) - 1)
            )
        return self._first_steps[epoch]

    def _steps(self, epoch: int) -> int:
        return -(-len(self._batches(epoch)) // self._accumulate)

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._plan[0] != epoch:
            order = list(range(len(self._examples)))
            random.Random(self._seed + epoch).shuffle(order)
            self._plan = epoch, group_by_length(self._lengths, self._batch_tokens, order)
        return self._plan[1]


def train_eval_split(
    rows: list[Piece], share: float, seed: int, key: Callable[[Any], object] | None = None
) -> tuple[list[Piece], list[Piece]]:
    """Rows to train on and rows held out for judging, about `share` of them; both in the order of the file.

    Rows with the same `key` (by default, the same content) stay on one side, so that nothing held out was seen. Raises
    `DataError` when there are fewer than two different rows.
    """
    if not 0 <= share < 1:
        raise DataError(
            f"a held-out share of {share} leaves nothing to train on", hint="e.g. --holdout 0.1"
        )
    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((key or _content)(row), []).append(index)
    if len(groups) < 2:
        why = "some rows are kept for judging, and what is judged must not be trained on"
        raise DataError(
            f"at least 2 different rows are needed, found {len(groups)}", why=why, hint="add rows"
        )
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    held = _take(shuffled, min(max(1, round(share * len(rows))), len(rows) - 1))
    return [row for n, row in enumerate(rows) if n not in held], [
        row for n, row in enumerate(rows) if n in held
    ]


def _take(groups: Sequence[list[int]], target: int) -> set[int]:
    """Groups, in their order, that hold at most `target` indices; the smallest one where all are larger."""
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= target:
            held.update(group)
    if not held:
        held.update(sorted(groups, key=len)[0])
    return held


def _content(row: Any) -> object:
    messages: Iterable[dict[str, str]] = row.messages or ()
    return (
        tuple(tuple(sorted(message.items())) for message in messages),
        row.prompt,
        row.completion,
        row.text,
    )
