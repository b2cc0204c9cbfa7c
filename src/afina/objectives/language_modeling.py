"""Next-token objectives: supervised fine-tuning on completions, continued pretraining on texts.

    loss = - sum over targets t of log p(token[t] | tokens before t)   /   number of targets

The two differ only in which tokens are targets.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import BatchSampler, PackedBatch, batches_by_length, pack_examples
from afina.data.renderer import Example
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.models.causal_lm import CausalLM
from afina.objectives.base import LossSum, Objective, perplexity
from afina.objectives.language_data import infer_objective, read_examples, tokenize_rows
from afina.objectives.prepared import (
    BATCH_TOKENS,
    PROFILE_TOKENS,
    Preparation,
    PreparedData,
    eval_source,
    run_renderer,
    show_example,
)
from afina.objectives.reference import segments_for
from afina.objectives.registry import get_objective, register_objective
from afina.objectives.run_rows import read_files
from afina.objectives.workload import StepWorkload, packed_workload
from afina.settings import EvalSettings, TrainSettings


def target_losses(base: CausalLM, batch: PackedBatch, active: ActiveAdapters) -> Tensor:
    """Return the cross-entropy of each target `(num_targets,)`, in nats."""
    with base.forward_context.use(segments_for(batch, active)):
        return base.token_losses(batch.token_ids, batch.positions, batch.cu_seqlens, batch.labels)


def batch_loss(base: CausalLM, batch: PackedBatch, active: ActiveAdapters) -> Tensor:
    """Return the sum of the cross-entropy over the targets of a batch, in nats."""
    return target_losses(base, batch, active).sum()


@torch.no_grad()
def example_losses(
    base: CausalLM, examples: Sequence[Example], batch_tokens: int, active: ActiveAdapters
) -> list[LossSum]:
    """Return the cross-entropy of each example, computed in batches of `batch_tokens` tokens."""
    found = [LossSum(0.0, 0)] * len(examples)
    for indices, chosen in batches_by_length(examples, batch_tokens):
        losses = target_losses(base, pack_examples(chosen).to(base.device), active).double()
        counts = [sum(example.loss_mask) for example in chosen]
        for i, part in zip(indices, losses.split(counts), strict=True):
            found[i] = LossSum(part.sum().item(), len(part))
    return found


def mean_loss(
    base: CausalLM, examples: Sequence[Example], batch_tokens: int, active: ActiveAdapters
) -> float:
    """Return the mean cross-entropy over the targets of `examples`, in nats per token."""
    return LossSum.mean(example_losses(base, examples, batch_tokens, active))


class LanguageModelingObjective(Objective):
    """Next-token prediction on packed batches of about `batch_tokens` tokens."""

    shares_pass = True
    planned_by_tokens = True
    base: CausalLM

    @classmethod
    def prepare(cls, settings: TrainSettings, base: CausalLM | None = None) -> PreparedData:
        """Read, tokenize, check and split the rows; load the base, unless it is given."""
        table = read_files(settings, SFT)
        prep = Preparation.start(settings, base)
        rows = read_examples(settings, table, prep.renderer)
        records = [row.record() for row in rows.eval_sft_rows] or [
            {"text": prep.base.decode(example.token_ids)} for example in rows.eval_examples
        ]
        objective: Any = get_objective(rows.objective) if settings.objective == "auto" else cls
        task = objective(prep.base, rows.train, rows.eval_examples, *prep.packing)
        show = partial(show_example, prep.renderer)
        return prep.finish(task, table, rows.skipped, show, records, **rows.counts)

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "LanguageModelingObjective":
        """Return the objective with the rows that `afina eval` evaluates."""
        base, (file, columns) = opened.causal_lm, eval_source(settings)
        rows = read_table(file, SFT, columns).rows
        renderer = run_renderer(opened, base)
        examples = tokenize_rows(infer_objective("auto", rows), renderer, rows, None)
        objective = cls(base, examples, examples, BATCH_TOKENS, 1, 0)
        objective.num_rows = len(rows)
        return objective

    def __init__(
        self,
        base: CausalLM,
        train: Sequence[Example],
        eval_rows: Sequence[Example],
        batch_tokens: int,
        accumulate: int,
        seed: int,
    ) -> None:
        self.base, self.train, self.eval_rows = base, train, eval_rows
        self._batch_tokens = batch_tokens
        self._sampler = BatchSampler(train, batch_tokens, accumulate, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return self._sampler.steps_per_epoch

    def step_batches(self, step: int) -> list[PackedBatch]:
        """Return the micro-batches of an optimizer step, on the base's device."""
        return [batch.to(self.base.device) for batch in self._sampler.step_batches(step)]

    def collate(self, rows: Sequence[Example], seed: int) -> PackedBatch:
        """Return some rows as one packed batch; nothing about it is random."""
        return pack_examples(rows).to(self.base.device)

    def row_locations(self, step: int) -> list[str]:
        """Return `file:line` of the rows of an optimizer step."""
        return sorted(
            {example.where for batch in self._sampler.step_examples(step) for example in batch}
        )

    def num_targets(self, batch: PackedBatch) -> int:
        """Return the number of target tokens."""
        return batch.num_targets

    def num_tokens(self, batch: PackedBatch) -> int:
        """Return the number of tokens."""
        return len(batch.token_ids)

    def loss(self, batch: PackedBatch, active: ActiveAdapters) -> Tensor:
        """Return the sum of the cross-entropy over the targets of a batch, in nats."""
        return batch_loss(self.base, batch, active)

    def row_losses(self, rows: Sequence[Example], active: ActiveAdapters) -> list[LossSum]:
        """Return the loss of each row."""
        return example_losses(self.base, rows, self._batch_tokens, active)

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss of the eval rows (nats per token) and its perplexity."""
        loss = self.eval_loss(active)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def expected_completions(self) -> list[Example]:
        """Return the eval examples with a completion."""
        return [example for example in self.eval_rows if example.completion is not None]

    def step_workload(self) -> StepWorkload:
        """Return the sizes of the first epoch's micro-batches."""
        return packed_workload(self._sampler, self.eval_rows)

    def profile_prompts(self) -> list[list[int]]:
        """Return the prompt of each training row, or the first tokens of a text."""
        return [e.token_ids[: e.prompt_length] or e.token_ids[:PROFILE_TOKENS] for e in self.train]


@register_objective("sft")
class SFTObjective(LanguageModelingObjective):
    """Supervised fine-tuning: next-token prediction on the completions."""


@register_objective("pretrain")
class PretrainObjective(LanguageModelingObjective):
    """Continued pretraining: next-token prediction on all tokens of a text."""

    chunks_texts = True
