"""Completions of one optimizer step, packed with what is learned from each of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.segments import Segments
from afina.data.packing import IGNORE_INDEX, PackedBatch, pack_examples
from afina.data.renderer import Example
from afina.engine.request import Completion
from afina.objectives.metric_sums import MetricSums

if TYPE_CHECKING:
    from afina.objectives.policy_data import TokenizedPrompt


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Prompts with their completions, packed, and values of the completions' tokens.

    Tensors are `(num_targets,)`, one value per token of a completion, unless stated otherwise.

    Attributes:
        flat: The packed sequences.
        masked_token_ids: `(num_tokens,)`, completions hidden: only a prompt can invoke an adapter.
        counts: `(num_sequences,)`, tokens of each completion.
        reference: Log-probabilities under the reference, in nats.
        advantages: Advantages.
        indices: Index of each completion among those of the step.
        old_logprobs: Log-probabilities when sampled; None where the policy has not changed since.
        values: Values that the value head predicted.
        returns: Targets of the value head.
    """

    flat: PackedBatch
    masked_token_ids: Tensor
    counts: Tensor
    reference: Tensor
    advantages: Tensor
    indices: tuple[int, ...] = ()
    old_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    @classmethod
    def pack(cls, examples: Sequence[Example], device: torch.device) -> "RolloutBatch":
        """Return a batch of prompts with completions; reference and advantages are still empty."""
        empty = torch.zeros(0, device=device)
        counts = torch.tensor([sum(e.loss_mask) for e in examples], device=device)
        hidden = masked_tokens(examples).to(device)
        return cls(pack_examples(examples).to(device), hidden, counts, empty, empty)

    def segments(self, active: ActiveAdapters) -> Segments:
        """Return the adapter segments of the batch."""
        return active.segments(self.masked_token_ids, self.flat.cu_seqlens)

    def drift(self) -> Tensor:
        """Return the log-ratio of the sampling policy and the reference, per token (nats)."""
        assert self.old_logprobs is not None
        return self.old_logprobs - self.reference


@dataclass
class Rollout:
    """The batches of a step and metrics of its completions."""

    step: int
    batches: list[RolloutBatch]
    metrics: MetricSums = field(default_factory=MetricSums)


def masked_tokens(examples: Sequence[Example]) -> Tensor:
    """Return the packed token ids `(num_tokens,)` of examples, completions as IGNORE_INDEX."""
    hidden = [
        replace(e, token_ids=[*e.token_ids[: e.prompt_length], *[IGNORE_INDEX] * sum(e.loss_mask)])
        for e in examples
    ]
    return pack_examples(hidden).token_ids


def with_advantages(batches: Sequence[RolloutBatch], advantages: Tensor) -> list[RolloutBatch]:
    """Return batches in which all tokens of a completion have its advantage.

    Args:
        batches: The batches of a step.
        advantages: `(num_prompts, group_size)`.
    """
    flat = advantages.flatten().float()
    return [
        replace(
            batch,
            advantages=flat[list(batch.indices)]
            .to(batch.counts.device)
            .repeat_interleave(batch.counts),
        )
        for batch in batches
    ]


def to_example(prompt: "TokenizedPrompt", completion: Completion) -> Example:
    """Return a prompt with its completion, whose tokens are the targets."""
    length, tokens = len(prompt.token_ids), completion.token_ids
    mask = [False] * length + [True] * len(tokens)
    return Example(prompt.where, [*prompt.token_ids, *tokens], mask, length, completion.text)


def completion_metrics(completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Return length (tokens) and whether a stop token ended it, `(num_completions,)` each."""
    return {
        "length": torch.tensor([float(len(one.token_ids)) for one in completions]),
        "stop_ratio": torch.tensor([float(one.ended_by_stop) for one in completions]),
    }
