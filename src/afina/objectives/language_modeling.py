"""Next-token objectives: supervised fine-tuning on the answers, and continued pretraining on whole texts.

    loss = - sum over labelled t of log p(token[t+1] | tokens up to t)   /   number of labelled t

The two differ only in which tokens carry a label.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.adapters.segments import NO_ADAPTERS
from afina.data.packing import BatchSampler, PackedBatch, group_by_length, pack_examples
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.models.causal_lm import CausalLM
from afina.objectives.base import Objective, perplexity, train_sample
from afina.objectives.language_data import infer_objective, read_examples, tokenize_rows
from afina.objectives.prepared import (
    BATCH_TOKENS,
    PROFILE_TOKENS,
    PreparedData,
    describe_data,
    eval_source,
    load_language_model,
)
from afina.objectives.registry import get_objective, register_objective
from afina.objectives.workload import StepWorkload, packed_workload
from afina.settings import EvalSettings, TrainSettings


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


class LanguageModelingObjective(Objective):
    """Next-token prediction on packed batches of about `batch_tokens` tokens."""

    shares_pass = True
    planned_by_tokens = True
    base: CausalLM

    @classmethod
    def prepare(cls, settings: TrainSettings, base: CausalLM | None = None) -> PreparedData:
        """Read, tokenize, check and split the rows; load the base, unless it is given."""
        table = read_table(settings.data, SFT, settings.columns, settings.skip_bad_rows)
        base, own_tokens = load_language_model(settings, base)
        rows = read_examples(settings, table, base.tokenizer, base.max_positions)
        records = [row.record() for row in rows.held_rows] or [
            {"text": base.decode(example.token_ids)} for example in rows.eval_examples
        ]
        objective = get_objective(rows.objective) if settings.objective == "auto" else cls
        task: Any = objective
        return PreparedData(
            base=base,
            task=task(
                base,
                rows.train,
                rows.eval_examples,
                settings.max_tokens_per_batch,
                settings.gradient_accumulation_steps,
                settings.seed,
            ),
            data_info=describe_data(table, len(rows.eval_examples)),
            skipped=rows.skipped,
            example=rows.renderer.format_loss_mask(rows.train[0]),
            eval_records=records,
            invocation=rows.invocation,
            trainable_tokens=own_tokens,
            max_length=rows.renderer.max_length,
            counts=rows.counts,
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "LanguageModelingObjective":
        """Return the objective with the rows that `afina eval` evaluates."""
        base, (file, columns) = opened.causal_lm, eval_source(settings)
        rows = read_table(file, SFT, columns).rows
        renderer = Renderer(base.tokenizer, opened.chat_format, min(base.max_positions, 2048))
        examples = tokenize_rows(infer_objective("auto", rows), renderer, rows, None)
        objective = cls(base, examples, examples, BATCH_TOKENS, 1, 0)
        objective.num_rows = len(rows)
        return objective

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

    def eval_loss(self, route: ActiveAdapters | None) -> float:
        """Mean over the labels of the held-out rows, in nats."""
        return mean_loss(self.base, self.eval_rows, self._batch_tokens, route)

    def train_loss(self, route: ActiveAdapters | None) -> float:
        """The same over as many of the rows that are learned from."""
        return mean_loss(self.base, train_sample(self), self._batch_tokens, route)

    def evaluate(self, route: ActiveAdapters | None) -> dict[str, Any]:
        """Return the loss of the eval rows (nats per token) and its perplexity."""
        loss = self.eval_loss(route)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def expected_completions(self) -> list[Example]:
        """Return the eval examples with a completion."""
        return [example for example in self.eval_rows if example.completion is not None]

    def step_workload(self) -> StepWorkload:
        """Return the sizes of the first epoch's micro-batches."""
        return packed_workload(self._sampler, self.eval_rows)

    def profile_prompts(self) -> list[list[int]]:
        """Return the prompt of each training row, or the first tokens of a text."""
        return [
            e.token_ids[: e.prompt_length] or e.token_ids[:PROFILE_TOKENS] for e in self.train
        ]


@register_objective("sft")
class SFTObjective(LanguageModelingObjective):
    """Supervised fine-tuning: next-token prediction on the completions."""


@register_objective("pretrain")
class PretrainObjective(LanguageModelingObjective):
    """Continued pretraining: next-token prediction on all tokens of a text."""
