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
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import (
    BatchSampler,
    PackedBatch,
    balanced_partition,
    group_by_length,
    pack_examples,
)
from afina.data.renderer import Example, Renderer
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import CausalLM
from afina.objectives.base import LossSum, Objective, Total, Units, no_reduce, train_sample
from afina.objectives.preference_data import (
    PreferenceExample,
    format_preference,
    read_comparable,
    split_preferences,
    tokenize_preferences,
)
from afina.objectives.preference_losses import (
    AnswerLogprobs,
    kto_losses,
    pair_losses,
    preference_metrics,
)
from afina.objectives.preference_report import preference_report
from afina.objectives.prepared import (
    BATCH_TOKENS,
    PROFILE_TOKENS,
    PreparedData,
    activation_tokens,
    describe_data,
    eval_source,
    load_language_model,
    trained_settings,
)
from afina.objectives.reference import segments_for, sequence_logprobs
from afina.objectives.registry import register_objective
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.objectives.workload import StepWorkload, pairwise_workload
from afina.settings import EvalSettings, PreferenceSettings, TrainSettings


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


class PairwiseObjective(Objective):
    """Preferences on packed batches, one loss per row; `score_batch` is what is minimized."""

    schema = "preference"
    units = Units("pair", "")
    report_key = "preferences"
    single: ClassVar[bool] = False  # rows of one completion with a label, not of two
    base: CausalLM

    @classmethod
    def create(
        cls, settings: TrainSettings, base: CausalLM, train: Any, held: Any, packing: Any
    ) -> "PairwiseObjective":
        """Return the objective on tokenized rows; `packing`: batch tokens, accumulation, seed."""
        return cls(base, train, held, *packing)

    @classmethod
    def prepare(cls, settings: TrainSettings, base: CausalLM | None = None) -> PreparedData:
        """Read, tokenize, check and split the rows; load the base, unless it is given."""
        table = read_comparable(
            settings.data, settings.columns, cls.name, cls.single, settings.skip_bad_rows
        )
        base, own_tokens = load_language_model(settings, base)
        modules = (base.add_score_head(),) if cls.head else ()
        length = settings.max_length or min(base.max_positions, 2048)
        renderer = Renderer(base.tokenizer, ChatFormat.from_settings(settings), length)
        invocation = activation_tokens(renderer, settings)
        skipped = list(table.skipped)
        train, held = split_preferences(settings, table, renderer, invocation, skipped, cls.single)
        accumulation = settings.gradient_accumulation_steps
        packing = (settings.max_tokens_per_batch, accumulation, settings.seed)
        examples = [choice for _, choice in train]
        task = cls.create(settings, base, examples, [choice for _, choice in held], packing)
        return PreparedData(
            base=base,
            task=task,
            data_info=describe_data(table, len(held)),
            skipped=skipped,
            example=format_preference(renderer, examples[0]),
            eval_records=[row.record() for row, _ in held],
            invocation=invocation,
            modules_to_save=modules,
            trainable_tokens=own_tokens,
            max_length=renderer.max_length,
            counts={
                "train": len(train),
                "held_out": len(held),
                "tokens": sum(len(choice.token_ids) for choice in examples),
                "longest": max(len(e.token_ids) for c in examples for e in c.completions),
                **renderer.counts,
            },
            units=cls.units,
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "PairwiseObjective":
        """Return the objective with the rows that `afina eval` evaluates."""
        base: Any = opened.base
        trained, (file, columns) = trained_settings(opened.run), eval_source(settings)
        rows = read_comparable(file, columns, cls.name, cls.single).rows
        length = trained.max_length or min(base.max_positions, 2048)
        renderer = Renderer(base.tokenizer, opened.chat_format, length)
        invocation = opened.adapters[0][0].config.invocation if opened.adapters else ()
        examples = [
            choice
            for _, choice in tokenize_preferences(renderer, rows, None, invocation, cls.single)
        ]
        packing = (BATCH_TOKENS, 1, trained.seed)
        objective = cls.create(trained, base, examples, examples, packing)
        objective.num_rows = len(rows)
        return objective

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

    def row_losses(
        self, rows: Sequence[PreferenceExample], route: ActiveAdapters | None
    ) -> list[LossSum]:
        """Return the loss of each row."""
        return [LossSum(loss, 1) for loss in self._packed_losses(rows, route)]

    @torch.no_grad()
    def _packed_losses(
        self,
        rows: Sequence[PreferenceExample],
        route: ActiveAdapters | None,
        tally: "MetricSums | None" = None,
    ) -> list[float]:
        """Return the loss of each row, computed on packed batches; metrics are added to `tally`."""
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
        losses = self._packed_losses(self.eval_rows, route, self._check)
        return sum(losses) / len(losses)

    def train_loss(self, route: ActiveAdapters | None) -> float:
        """The same over as many of the rows that are learned from."""
        losses = self._packed_losses(train_sample(self), route)
        return sum(losses) / len(losses)

    def evaluate(self, route: ActiveAdapters | None) -> dict[str, Any]:
        """Return the loss and the metrics of the eval rows: accuracy, margins, log-probabilities."""
        tally = MetricSums()
        losses = self._packed_losses(self.eval_rows, route, tally)
        return {"loss": sum(losses) / len(losses)} | tally.means()

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Compare two results of `evaluate`; log-probabilities are nats per completion."""
        return preference_report(self, before, after)

    def step_workload(self) -> StepWorkload:
        """Return the sizes of an epoch's micro-batches, and the passes of the reference."""
        return pairwise_workload(self)

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Means over the rows of the last step, and, after a check, of those held out."""
        return self._step.added_up(total).means() | {
            f"eval_{name}": value for name, value in self._check.means().items()
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
    """A loss on the log-probabilities of completions; subclasses are named after the loss."""

    default_learning_rate_factor = 0.1  # preferences are trained from a model that is good already

    def __init__(self, options: PreferenceSettings, *given: Any) -> None:
        super().__init__(*given)
        self.options = options

    @classmethod
    def create(
        cls, settings: TrainSettings, base: CausalLM, train: Any, held: Any, packing: Any
    ) -> "PreferenceObjective":
        """Return the objective on tokenized rows; `packing`: batch tokens, accumulation, seed."""
        return cls(settings.group(cls.name), base, train, held, *packing)

    def score_batch(
        self, batch: PreferenceBatch, route: ActiveAdapters | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses (rows) and facts under `route`."""
        (logps, tokens), known = self._logps(batch.flat, batch.examples, route)
        good, bad = (
            AnswerLogprobs(logps[side], None if known is None else known[side], tokens[side])
            for side in (batch.chosen, batch.rejected)
        )
        facts = preference_metrics(self.name, self.options, good, bad)
        if not self.single:
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

    def start_run(self, folder: Path) -> None:
        """Write down the reference of a run, and what it has to know beforehand."""
        if self.reference is not None:
            rows = [*self.train, *self.eval_rows]
            sequences = [
                e
                for row in rows
                for e in (row.chosen, row.rejected, row.mismatched)
                if e is not None
            ]
            self.reference.start_run(folder, self.base, sequences, self._batch_tokens)

    def profile_prompts(self) -> list[list[int]]:
        """Return the prompt of each training row."""
        rows = [row.completions[0] for row in self.train if row.completions]
        return [e.token_ids[: e.prompt_length] or e.token_ids[:PROFILE_TOKENS] for e in rows]


@register_objective("dpo")
class DPOObjective(PreferenceObjective):
    """Direct preference optimization; also IPO, hinge and robust DPO, by `loss_type`."""

    needs_reference = True


@register_objective("kto")
class KTOObjective(PreferenceObjective):
    """Kahneman-Tversky optimization, on completions labeled good or bad."""

    needs_reference = True
    single = True
    units = Units("answer", "")


@register_objective("orpo")
class ORPOObjective(PreferenceObjective):
    """Odds-ratio preference optimization, without a reference."""


@register_objective("simpo")
class SimPOObjective(PreferenceObjective):
    """Simple preference optimization: mean log-probabilities per token, without a reference."""
