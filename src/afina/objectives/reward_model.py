"""Reward model: a number for a completion, learned from which of two is better.

    r(completion) = v . h      h: hidden state at its last token; v: a head, initially zero
    P(w before l) = s(r(w) - r(l)),   loss = -log P

The head belongs to the adapter and the base keeps its output layer, so that one base in memory is
policy and reward model: the active adapters select which. Calibration is the expected error of P,
a ratio: of the pairs to which it gives 80%, 80% should be right (ten bins from a half to one).

References:
    Loss: Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155.
    Calibration: Guo et al. 2017, arXiv 1706.04599.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from afina.adapters.active import ActiveAdapters
from afina.data.packing import PackedBatch
from afina.models.causal_lm import SCORE, CausalLM
from afina.objectives.preference import PairwiseObjective
from afina.objectives.preference_batch import PreferenceBatch
from afina.objectives.preference_losses import reward_metrics
from afina.objectives.reference import segments_for
from afina.objectives.registry import register_objective
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.objectives.workload import StepWorkload, pairwise_workload

NUM_BINS = 10  # of confidences from a half to one


def score_sequences(base: CausalLM, batch: PackedBatch, active: ActiveAdapters) -> Tensor:
    """Return the reward of each sequence `(num_sequences,)`, float32; 0 without an adapter."""
    table = segments_for(batch, active)
    inputs = SharedPrefixBatch(base, batch, table).inputs_for(table)
    last = inputs.positions_of([end - 1 for end in batch.cu_seqlens[1:]])
    with base.forward_context.use(inputs.table):
        hidden = base.hidden_states(inputs.token_ids, inputs.positions, inputs.flat)[last]
    # the last token follows any invocation, so that the head is always active there
    with base.forward_context.use(segments_for(batch, active and active.always_on())):
        return base.model.get_submodule(SCORE)(hidden.float())[:, 0]


def calibration_error(margins: Tensor) -> float:
    """Return the expected calibration error, 0 to 1, of s(|margin|) as a probability.

    Args:
        margins: `(n,)`, differences of rewards; a positive one is right.
    """
    confidence = torch.sigmoid(margins.abs().double())
    right = (margins > 0).double()
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = [(right[bins == b].sum() - confidence[bins == b].sum()).abs() for b in range(NUM_BINS)]
    return float(torch.stack(gaps).sum() / len(margins))


@register_objective("reward")
class RewardModelObjective(PairwiseObjective):
    """Bradley-Terry loss on pairs, with a scalar head."""

    head = SCORE
    shares_base = False

    def score_batch(
        self, batch: PreferenceBatch, active: ActiveAdapters
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of each pair `(num_pairs,)`, and rewards, margins and lengths."""
        found = score_sequences(self.base, batch.flat, active)
        good, bad = found[batch.chosen], found[batch.rejected]
        lengths = torch.tensor([float(sum(example.loss_mask)) for example in batch.examples])
        return -logsigmoid(good - bad), reward_metrics(good.detach(), bad.detach()) | {
            "chosen_length": lengths[batch.chosen.cpu()],
            "rejected_length": lengths[batch.rejected.cpu()],
        }

    def next_command(self, folder: Path) -> None:
        """Return None: policies use a reward model, by their setting `reward_funcs`."""

    def step_workload(self) -> StepWorkload:
        """Return the sizes of an epoch's micro-batches; each sequence has one target, its score."""
        final = ("the evaluation of a reward model's calibration after the last step",)
        return pairwise_workload(self, lambda batch: len(batch.cu_seqlens) - 1, final)

    @torch.no_grad()
    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss and metrics of the eval pairs, with the calibration error (ratio)."""
        margins = [
            self.score_batch(self.collate([row], 0), active)[1]["rewards/margins"]
            for row in self.eval_rows
        ]
        error = calibration_error(torch.cat(margins))
        return super().evaluate(active) | {"calibration_error": error}
