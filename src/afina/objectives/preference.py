"""Learning from preferences: rows of one or two answers, laid end to end like any others, and a loss for each row.

    tokens     | prompt 1 + better | prompt 2 + better | prompt 1 + worse | prompt 2 + worse |
    labels     |           ooooooo |           ooooooo |           oooooo |           oooooo |    only answers
    rows       |         1         |         2         |        1         |        2         |

Masked tokens never reach the output layer, and a prompt that two answers share is computed once (see `reading`). A row is
the unit: it has one loss, is held out whole, and its answers share a batch. What KTO compares with (z) is the same for all
rows of an optimizer step, however they are packed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.data.packing import (
    BatchSampler,
    PackedBatch,
    balanced_partition,
    group_by_length,
    pack_examples,
)
from afina.data.renderer import Example, Renderer
from afina.data.schemas import PreferenceRow, prompt_key
from afina.data.table import parse_rows, summarize_skipped
from afina.errors import DataError
from afina.models.causal_lm import CausalLM
from afina.objectives.base import Total, no_reduce, train_sample
from afina.objectives.language_modeling import mask_before_invocation
from afina.objectives.preference_losses import (
    AnswerLogprobs,
    kto_losses,
    pair_losses,
    preference_metrics,
)
from afina.objectives.reference import ReferencePolicy, segments_for, sequence_logprobs
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.settings import PreferenceSettings

MATE_TRIES = 8  # other rows looked at for one whose answer fits to a prompt


@dataclass(frozen=True)
class PreferenceExample:
    """A row as tokens: the better answer and the worse one (with a label, one of them), each with its prompt.

    `mate` is the prompt with the answer of another row, which KTO's z is an average over.
    """

    where: str
    chosen: Example | None
    rejected: Example | None
    mismatched: Example | None = None

    @cached_property
    def token_ids(self) -> list[int]:
        """All that passes through the model, by which rows are packed."""
        return [
            token
            for example in (self.chosen, self.rejected)
            if example
            for token in example.token_ids
        ]


@dataclass
class KLSamples:
    """The mismatched answers of an optimizer step, and z once it is known."""

    examples: list[Example]
    kl_baseline: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PreferenceBatch:
    """Answers end to end, better ones first; `good` and `bad` are their numbers among the sequences of `flat`."""

    flat: PackedBatch
    examples: tuple[Example, ...]
    chosen: Tensor
    rejected: Tensor
    rows: int
    mates: KLSamples

    def shard(self, number: int, of: int) -> "PreferenceBatch":
        """Some of the rows: one of `of` parts of about as many tokens; one without rows where none is left for it.

        z stays that of all rows of the step: each part works it out from the same mates.
        """
        good, bad, bounds = self.chosen.tolist(), self.rejected.tolist(), self.flat.cu_seqlens
        pairs = self.rows == len(good) == len(bad)
        rows = list(zip(good, bad, strict=True)) if pairs else [(n,) for n in (*good, *bad)]
        sizes = [sum(bounds[n + 1] - bounds[n] for n in row) for row in rows]
        mine = [rows[n] for n in balanced_partition(sizes, of)[number]]
        kept = {n for row in mine for n in row}
        better, worse = [n for n in good if n in kept], [n for n in bad if n in kept]
        sequences = [*better, *worse] or [0]
        numbers = torch.arange(len(kept), device=self.chosen.device)
        examples = tuple(self.examples[n] for n in sequences)
        first, second = numbers[: len(better)], numbers[len(better) :]
        return PreferenceBatch(
            self.flat.select(sequences), examples, first, second, len(mine), self.mates
        )


def tokenize_preferences(
    renderer: Renderer,
    rows: Sequence[PreferenceRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...],
    mates: bool,
) -> list[tuple[PreferenceRow, PreferenceExample]]:
    """Rows with their tokens. One that cannot be used is an error, or is listed in `skipped` when that is given.

    With an `invocation`, only what follows its last occurrence counts: before it policy and reference are the base.
    """

    def example(row: PreferenceRow, answer: Any) -> Example:
        made = renderer.example(row.row(answer))
        return mask_before_invocation(made, invocation) if invocation else made

    def make(where: str, number: int) -> tuple[PreferenceRow, PreferenceExample]:
        row = rows[number]
        good, bad = (
            example(row, answer) if answer is not None else None
            for answer in (row.chosen, row.rejected)
        )
        if good is not None and bad is not None and good.token_ids == bad.token_ids:
            raise DataError("the two answers are the same tokens", where=where)
        return row, PreferenceExample(
            where, good, bad, _mate(example, rows, number) if mates else None
        )

    made = parse_rows(((row.where, number) for number, row in enumerate(rows)), make, skipped)
    if not made:
        raise DataError(
            "no row is left to learn from", why=f"skipped: {summarize_skipped(skipped or [])}"
        )
    return made


def _mate(example: Any, rows: Sequence[PreferenceRow], number: int) -> Example | None:
    """The prompt of a row with the answer of one before it that has another prompt; None where there is none that fits."""
    row, tries = rows[number], 0
    for distance in range(1, len(rows)):
        other = rows[number - distance]
        if prompt_key(other) == prompt_key(row):
            continue
        try:
            return example(row, other.chosen if other.chosen is not None else other.rejected)
        except DataError:  # too long, or a text where messages are needed
            tries += 1
            if tries == MATE_TRIES:
                return None
    return None


class PairwiseObjective:
    """Preferences to learn from and to judge by, under any objective. See `Task`; what is minimised is in `judge`."""

    def __init__(
        self,
        base: CausalLM,
        train: list[PreferenceExample],
        held: list[PreferenceExample],
        batch_tokens: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.base, self.train, self.eval_rows = base, train, held
        self._batch_tokens = batch_tokens
        self._sampler = BatchSampler(train, batch_tokens, accumulate, seed)  # type: ignore[arg-type]
        self._step, self._check = MetricSums(), MetricSums()

    def score_batch(
        self, batch: PreferenceBatch, route: ActiveAdapters | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each row of a batch, in its order, and facts about the answers."""
        raise TypeError(f"{type(self).__name__} must say what a loss is")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return self._sampler.steps_per_epoch

    def _step_rows(self, step: int) -> list[list[PreferenceExample]]:
        return self._sampler.step_examples(step)  # type: ignore[return-value]

    def step_batches(self, step: int) -> list[PreferenceBatch]:
        """The micro-batches of an optimizer step, on the base's device; facts are collected anew."""
        self._step, self._check = MetricSums(), MetricSums()
        batches = self._step_rows(step)
        mates = mates_of([row for rows in batches for row in rows])
        return [self._batch(rows, mates) for rows in batches]

    def row_locations(self, step: int) -> list[str]:
        """Names of the rows of an optimizer step."""
        return sorted({row.where for rows in self._step_rows(step) for row in rows})

    def collate(self, rows: Sequence[PreferenceExample], seed: int) -> PreferenceBatch:
        """Some rows, on the base's device; nothing about them is random."""
        return self._batch(rows, mates_of(rows))

    def _batch(self, rows: Sequence[PreferenceExample], mates: KLSamples) -> PreferenceBatch:
        good, bad = (
            [row.chosen for row in rows if row.chosen],
            [row.rejected for row in rows if row.rejected],
        )
        if all(row.chosen and row.rejected for row in rows):
            numbers = torch.arange(len(rows)), torch.arange(len(rows)) + len(rows)
        else:
            numbers = torch.arange(len(good)), torch.arange(len(bad)) + len(good)
        flat = pack_examples([*good, *bad]).to(self.base.device)
        first, second = (n.to(self.base.device) for n in numbers)
        return PreferenceBatch(flat, (*good, *bad), first, second, len(rows), mates)

    def num_targets(self, batch: PreferenceBatch) -> int:
        """Rows: pairs, or labelled answers."""
        return batch.rows

    def num_tokens(self, batch: PreferenceBatch) -> int:
        """Tokens."""
        return len(batch.flat.token_ids)

    def loss(self, batch: PreferenceBatch, route: ActiveAdapters | None) -> Tensor:
        """Sum of the losses of the rows; what is trained on is noted."""
        losses, facts = self.score_batch(batch, route)
        if torch.is_grad_enabled():
            self._step.add(facts)
        return losses.sum()

    @torch.no_grad()
    def row_losses(
        self,
        rows: Sequence[PreferenceExample],
        route: ActiveAdapters | None,
        tally: "MetricSums | None" = None,
    ) -> list[float]:
        """The loss of each row, packed; facts are added to `tally`."""
        found, mates = dict.fromkeys(range(len(rows)), 0.0), mates_of(rows)
        for indices in group_by_length(
            [len(row.token_ids) for row in rows], self._batch_tokens, range(len(rows))
        ):
            chosen = sorted(
                indices, key=lambda i: rows[i].chosen is None
            )  # labels: good answers come first in a batch
            losses, facts = self.score_batch(self._batch([rows[i] for i in chosen], mates), route)
            found |= dict(zip(chosen, losses.tolist(), strict=True))
            if tally is not None:
                tally.add(facts)
        return list(found.values())

    def eval_loss(self, route: ActiveAdapters | None) -> float:
        """Mean over the held-out rows; their facts are noted."""
        self._check = MetricSums()
        losses = self.row_losses(self.eval_rows, route, self._check)
        return sum(losses) / len(losses)

    def train_loss(self, route: ActiveAdapters | None) -> float:
        """The same over as many of the rows that are learned from."""
        losses = self.row_losses(train_sample(self), route)
        return sum(losses) / len(losses)

    def eval_metrics(self, route: ActiveAdapters | None) -> dict[str, float]:
        """Means over the held-out rows: who won, by how much, log-probabilities, lengths."""
        tally = MetricSums()
        self.row_losses(self.eval_rows, route, tally)
        return tally.means()

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Means over the rows of the last step, and, after a check, of those held out."""
        return self._step.added_up(total).means() | {
            f"held_out_{name}": value for name, value in self._check.means().items()
        }


def mates_of(rows: Sequence[PreferenceExample]) -> KLSamples:
    """The mismatched answers of some rows."""
    return KLSamples([row.mismatched for row in rows if row.mismatched is not None])


@dataclass
class MetricSums:
    """Sums of facts, for their means."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, facts: Mapping[str, Tensor]) -> None:
        """Count some more: each fact is a tensor of values."""
        for name, values in facts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
            self.counts[name] = self.counts.get(name, 0) + values.numel()

    def added_up(self, total: Total) -> "MetricSums":
        """With those of other processes, which count the same facts."""
        names = list(self.sums)
        told = torch.tensor(
            [[self.sums[name], self.counts[name]] for name in names], dtype=torch.float64
        ).view(-1, 2)
        sums, counts = total(told).T.tolist()
        return MetricSums(
            dict(zip(names, sums, strict=True)), dict(zip(names, map(round, counts), strict=True))
        )

    def means(self) -> dict[str, float]:
        """Mean of each fact of which there is a value."""
        return {
            name: total / self.counts[name]
            for name, total in self.sums.items()
            if self.counts[name]
        }


class PreferenceObjective(PairwiseObjective):
    """dpo, kto, orpo and simpo. `reference` is what the first two compare with; `set_up` gives it when adapters are on."""

    def __init__(self, objective: str, options: PreferenceSettings, *given: Any) -> None:
        super().__init__(*given)
        self.objective, self.options = objective, options
        self.reference: ReferencePolicy | None = None

    def score_batch(
        self, batch: PreferenceBatch, route: ActiveAdapters | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses (rows) and facts under `route`."""
        (logps, tokens), known = self._logps(batch.flat, batch.examples, route)
        good, bad = (
            AnswerLogprobs(logps[side], None if known is None else known[side], tokens[side])
            for side in (batch.chosen, batch.rejected)
        )
        facts = preference_metrics(self.objective, self.options, good, bad)
        if self.objective != "kto":
            return pair_losses(self.options, good, bad), facts
        z = self._z(batch.mates, route)
        return torch.cat(kto_losses(self.options, good, bad, z)), facts | {"z": z[None]}

    def _logps(
        self, flat: PackedBatch, examples: Sequence[Example], route: ActiveAdapters | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """What `answer_logps` gives, and the reference's log-probabilities where there is one; read side by side."""
        base, reference = self.base, self.reference
        others = (
            [segments_for(flat, reference.active)]
            if reference is not None and reference.needs_forward
            else []
        )
        reading = SharedPrefixBatch(base, flat, segments_for(flat, route), *others)
        known = None if reference is None else reference.logps(base, flat, examples, reading)
        return sequence_logprobs(base, flat, route, reading), known

    @torch.no_grad()
    def _z(self, mates: KLSamples, route: ActiveAdapters | None) -> Tensor:
        """Mean of log p - log p' over the mismatched answers of a step, at least 0; worked out once a step."""
        if mates.kl_baseline is None:
            ratios = [torch.zeros(0, device=self.base.device)]
            examples = mates.examples
            for indices in group_by_length(
                [len(e.token_ids) for e in examples], self._batch_tokens, range(len(examples))
            ):
                chosen = [examples[i] for i in indices]
                flat = pack_examples(chosen).to(self.base.device)
                (logps, _), known = self._logps(flat, chosen, route)
                assert known is not None
                ratios.append(logps - known)
            together = torch.cat(ratios)
            mates.kl_baseline = (
                together.mean().clamp(min=0) if len(together) else together.new_zeros(())
            )
        return mates.kl_baseline

    def start_run(self, folder: Any) -> None:
        """Write down the reference of a run, and what it has to know beforehand."""
        if self.reference is not None:
            rows = [*self.train, *self.eval_rows]
            sequences = [
                e
                for row in rows
                for e in (row.chosen, row.rejected, row.mismatched)
                if e is not None
            ]
            self.reference.settle(folder, self.base, sequences, self._batch_tokens)
