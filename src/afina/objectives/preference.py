"""Objectives on preferences: rows of one or two completions, packed, with one loss per row.

    tokens     | prompt 1 + better | prompt 2 + better | prompt 1 + worse | prompt 2 + worse |
    targets    |           ooooooo |           ooooooo |           oooooo |           oooooo |
    rows       |         1         |         2         |        1         |        2         |

Tokens that are no targets never reach the output layer, and a prompt that two completions share is
computed once (see `shared_prefix`). A row is the unit: it has one loss, is held out completely, and
its completions share a batch. KTO's baseline z is the same for all rows of an optimizer step,
however they are packed.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import BatchSampler, PackedBatch, batches_by_length, pack_examples
from afina.data.renderer import Example, Renderer
from afina.data.row_store import StoredRows
from afina.data.several_files import join_tables, mix_rows
from afina.models.causal_lm import CausalLM
from afina.objectives.base import LossSum, Objective, Total, Units, no_reduce
from afina.objectives.metric_sums import MetricSums, report_metrics
from afina.objectives.preference_batch import KLSamples, PreferenceBatch, pack_preferences
from afina.objectives.preference_data import (
    PreferenceExample,
    read_comparable,
    show_preference,
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
    DEFAULT_MAX_LENGTH,
    PROFILE_TOKENS,
    Preparation,
    PreparedData,
    eval_source,
    trained_settings,
)
from afina.objectives.reference import segments_for, sequence_logprobs
from afina.objectives.registry import register_objective
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.objectives.workload import StepWorkload, pairwise_workload
from afina.settings import EvalSettings, TrainSettings


class PairwiseObjective(Objective):
    """Preferences on packed batches, one loss per row; `score_batch` is what is minimized.

    Args:
        options: The objective's own settings, if it has any.
        base: The model.
        train: Training rows.
        eval_rows: Eval rows.
        batch_tokens: Tokens of a micro-batch.
        accumulate: Micro-batches per optimizer step.
        seed: Seed of the order of rows.
    """

    schema = "preference"
    units = Units("pair", "")
    report_key = "preferences"
    single: ClassVar[bool] = False  # rows of one completion with a label, not of two
    displacement_hint: ClassVar[str] = ""  # settings against likelihood displacement
    base: CausalLM

    @classmethod
    def prepare(cls, settings: TrainSettings, base: CausalLM | None = None) -> PreparedData:
        """Read, tokenize, check and split the rows; load the base, unless it is given."""
        files = settings.data_files
        table = join_tables(
            [
                read_comparable(
                    file.path, file.columns or {}, cls.name, cls.single, settings.skip_bad_rows
                )
                for file in files
            ],
            [file.weight for file in files],
        )
        prep = Preparation.start(settings, base, cls.head)
        skipped = list(table.skipped)
        train, eval_rows = split_preferences(
            settings, table, prep.renderer, prep.invocation, skipped, cls.single
        )
        stored, held_out = (StoredRows(choice for _, choice in some) for some in (train, eval_rows))
        examples = mix_rows(stored, table.files, settings.seed)
        options = settings.group(cls.name)
        task = cls(options, prep.base, examples, held_out, *prep.packing)
        return prep.finish(
            task,
            table,
            skipped,
            partial(show_preference, prep.renderer),
            [row.record() for row, _ in eval_rows],
            longest=max(len(e.token_ids) for c in examples for e in c.completions),
            **prep.renderer.counts,
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "PairwiseObjective":
        """Return the objective with the rows that `afina eval` evaluates."""
        base: Any = opened.base  # a reward model is no causal language model to `causal_lm`
        trained, (file, columns) = trained_settings(opened.run), eval_source(settings)
        rows = read_comparable(file, columns, cls.name, cls.single).rows
        length = trained.max_length or min(base.max_positions, DEFAULT_MAX_LENGTH)
        renderer = Renderer(base.tokenizer, opened.chat_format, length, trained.truncate)
        invocation = opened.adapters[0][0].config.invocation if opened.adapters else ()
        prep = tokenize_preferences(renderer, rows, None, invocation, cls.single)
        examples = StoredRows(choice for _, choice in prep)
        options = trained.group(cls.name)
        objective = cls(options, base, examples, examples, BATCH_TOKENS, 1, trained.seed)
        objective.num_rows = len(rows)
        return objective

    def __init__(
        self,
        options: Any,
        base: CausalLM,
        train: Sequence[PreferenceExample],
        eval_rows: Sequence[PreferenceExample],
        batch_tokens: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.options, self.base, self.train, self.eval_rows = options, base, train, eval_rows
        self._batch_tokens = batch_tokens
        rows: Any = train
        self._sampler = BatchSampler(rows, batch_tokens, accumulate, seed)
        self._step, self._check = MetricSums(), MetricSums()

    def score_batch(
        self, batch: PreferenceBatch, active: ActiveAdapters
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of each row `(num_rows,)`, in the order of the batch, and metrics."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return self._sampler.steps_per_epoch

    def _step_rows(self, step: int) -> list[list[PreferenceExample]]:
        return self._sampler.step_examples(step)  # type: ignore[return-value]

    def step_batches(self, step: int) -> list[PreferenceBatch]:
        """Return the micro-batches of an optimizer step, and start its metrics anew."""
        self._step, self._check = MetricSums(), MetricSums()
        batches = self._step_rows(step)
        mismatched = KLSamples.of([row for rows in batches for row in rows])
        return [pack_preferences(rows, mismatched, self.base.device) for rows in batches]

    def row_locations(self, step: int) -> list[str]:
        """Return `file:line` of the rows of an optimizer step."""
        return sorted({row.where for rows in self._step_rows(step) for row in rows})

    def collate(self, rows: Sequence[PreferenceExample], seed: int) -> PreferenceBatch:
        """Return a batch of some rows; nothing about it is random."""
        return pack_preferences(rows, KLSamples.of(rows), self.base.device)

    def num_targets(self, batch: PreferenceBatch) -> int:
        """Return the number of rows: pairs, or labeled completions."""
        return batch.rows

    def num_tokens(self, batch: PreferenceBatch) -> int:
        """Return the number of tokens."""
        return len(batch.flat.token_ids)

    def loss(self, batch: PreferenceBatch, active: ActiveAdapters) -> Tensor:
        """Return the sum of the losses of the rows; in training, record metrics."""
        losses, metrics = self.score_batch(batch, active)
        if torch.is_grad_enabled():
            self._step.add(metrics)
        return losses.sum()

    def row_losses(
        self, rows: Sequence[PreferenceExample], active: ActiveAdapters
    ) -> list[LossSum]:
        """Return the loss of each row."""
        return self._packed_losses(rows, active, MetricSums())

    @torch.no_grad()
    def _packed_losses(
        self,
        rows: Sequence[PreferenceExample],
        active: ActiveAdapters,
        metrics: MetricSums,
    ) -> list[LossSum]:
        """Return the loss of each row, computed on packed batches, and add to `metrics`."""
        found = [LossSum(0.0, 1)] * len(rows)
        mismatched = KLSamples.of(rows)
        for indices, _ in batches_by_length(rows, self._batch_tokens):
            # in a batch of labeled completions the desirable ones come first
            chosen = sorted(indices, key=lambda i: rows[i].chosen is None)
            batch = pack_preferences([rows[i] for i in chosen], mismatched, self.base.device)
            losses, some = self.score_batch(batch, active)
            for i, loss in zip(chosen, losses.tolist(), strict=True):
                found[i] = LossSum(loss, 1)
            metrics.add(some)
        return found

    def eval_loss(self, active: ActiveAdapters) -> float:
        """Return the mean loss of the eval rows, and record their metrics."""
        self._check = MetricSums()
        return LossSum.mean(self._packed_losses(self.eval_rows, active, self._check))

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss and the metrics of the eval rows: accuracies, margins, logps."""
        sums = MetricSums()
        loss = LossSum.mean(self._packed_losses(self.eval_rows, active, sums))
        return {"loss": loss} | sums.means()

    report = preference_report

    def step_workload(self) -> StepWorkload:
        """Return the sizes of an epoch's micro-batches, and the passes of the reference."""
        return pairwise_workload(self)

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Return metrics of the last step and, with the prefix `eval_`, of the last check."""
        return report_metrics(self._step, self._check, total)


class PreferenceObjective(PairwiseObjective):
    """A loss on the log-probabilities of completions; subclasses are named after the loss."""

    default_learning_rate_factor = 0.1  # preferences are trained from a model that is good already

    def score_batch(
        self, batch: PreferenceBatch, active: ActiveAdapters
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of each row `(num_rows,)` and metrics of the completions."""
        (logps, tokens), known = self._logps(batch.flat, batch.examples, active)
        good, bad = (
            AnswerLogprobs(logps[side], None if known is None else known[side], tokens[side])
            for side in (batch.chosen, batch.rejected)
        )
        metrics = preference_metrics(self.options.beta, good, bad, self.single)
        if not self.single:
            return pair_losses(self.options, good, bad), metrics
        z = self._kl_baseline(batch.mismatched, active)
        return torch.cat(kto_losses(self.options, good, bad, z)), metrics | {"z": z[None]}

    def _logps(
        self, flat: PackedBatch, examples: Sequence[Example], active: ActiveAdapters
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Return `sequence_logprobs` and, where there is a reference, its log-probabilities.

        Policy and reference share the computation of common prefixes.
        """
        base, reference = self.base, self.reference
        tables = [segments_for(flat, active)]
        if reference is not None and reference.needs_forward:
            tables.append(segments_for(flat, reference.active))
        reading = SharedPrefixBatch(base, flat, *tables)
        known = None if reference is None else reference.logps(base, flat, examples, reading)
        return sequence_logprobs(base, flat, active, reading), known

    @torch.no_grad()
    def _kl_baseline(self, mismatched: KLSamples, active: ActiveAdapters) -> Tensor:
        """Return z, the mean log-ratio of a step's mismatched completions, at least 0; once."""
        if mismatched.kl_baseline is None:
            ratios = [torch.zeros(0, device=self.base.device)]
            for _, chosen in batches_by_length(mismatched.examples, self._batch_tokens):
                flat = pack_examples(chosen).to(self.base.device)
                (logps, _), known = self._logps(flat, chosen, active)
                assert known is not None
                ratios.append(logps - known)
            every = torch.cat(ratios)
            mismatched.kl_baseline = (
                every.mean().clamp(min=0) if len(every) else every.new_zeros(())
            )
        return mismatched.kl_baseline

    def start_run(self, folder: Path) -> None:
        """Write the reference of a run, and what it computes before the first step."""
        if self.reference is not None:
            every = [
                example
                for row in (*self.train, *self.eval_rows)
                for example in (row.chosen, row.rejected, row.mismatched)
                if example is not None
            ]
            self.reference.start_run(folder, self.base, every, self._batch_tokens)

    def profile_prompts(self) -> list[list[int]]:
        """Return the prompt of each training row."""
        rows = [row.completions[0] for row in self.train if row.completions]
        return [e.token_ids[: e.prompt_length] or e.token_ids[:PROFILE_TOKENS] for e in rows]


@register_objective("dpo")
class DPOObjective(PreferenceObjective):
    """Direct preference optimization; also IPO, hinge and robust DPO, by `loss_type`."""

    needs_reference = True
    displacement_hint = "`sft_weight: 0.2`, `loss_type: ipo`, "


@register_objective("kto")
class KTOObjective(PreferenceObjective):
    """Kahneman-Tversky optimization, on completions labeled good or bad."""

    needs_reference = True
    single = True
    units = Units("answer", "")
    displacement_hint = "a larger `desirable_weight`, "


@register_objective("orpo")
class ORPOObjective(PreferenceObjective):
    """Odds-ratio preference optimization, without a reference."""

    displacement_hint = "a smaller `beta`, "


@register_objective("simpo")
class SimPOObjective(PreferenceObjective):
    """Simple preference optimization: mean log-probabilities per token, without a reference."""

    displacement_hint = "`sft_weight: 0.2`, "
