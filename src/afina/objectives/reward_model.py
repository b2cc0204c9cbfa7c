"""A reward model: a number for an answer, learned from which of two is better.

    r(answer) = v . h          h the hidden state at its last token, v a head that starts at zero and is the adapter's own
    P(w before l) = s(r(w) - r(l)),   loss = -log P                    Bradley and Terry 1952; Ouyang et al. 2022, 2203.02155

The base keeps its output layer, so that one model in memory is policy and judge: which of them acts is a matter of the route.
Calibration is the expected error of P, as a share: of the pairs of which it is 80% sure, it should be right on 80%
(Guo et al. 2017, arXiv 1706.04599; ten bins from a half to one).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from afina.adapters.active import ActiveAdapters
from afina.adapters.segments import NO_ADAPTERS
from afina.data.packing import PackedBatch
from afina.models.causal_lm import SCORE, CausalLM
from afina.objectives.preference import PairwiseObjective, PreferenceBatch
from afina.objectives.reference import segments_for
from afina.objectives.registry import register_objective
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.objectives.workload import StepWorkload, pairwise_workload

BINS = 10


def score_sequences(base: CausalLM, batch: PackedBatch, route: ActiveAdapters | None) -> Tensor:
    """The reward of each sequence of a flat run (sequences), float32; without an adapter it is 0."""
    table = segments_for(batch, route)
    lean = SharedPrefixBatch(base, batch, table).inputs_for(table)
    with base.forward_context.use(lean.table):
        hidden = base.hidden_states(lean.token_ids, lean.positions, lean.flat)[
            lean.positions_of([end - 1 for end in batch.cu_seqlens[1:]])
        ]
    # the last token comes after any invocation: there the head acts on all that is left
    with base.forward_context.use(
        NO_ADAPTERS
        if route is None
        else route.always_on().segments(batch.token_ids, batch.cu_seqlens)
    ):
        return base.model.get_submodule(SCORE)(hidden.float())[:, 0]


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error, 0 to 1, of s(|margin|) as the probability that a positive margin is right; margins (n)."""
    sure = torch.sigmoid(margins.abs().double())
    right = (margins > 0).double()
    bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = [(right[bins == b].sum() - sure[bins == b].sum()).abs() for b in range(BINS)]
    return float(torch.stack(gaps).sum() / len(margins))


@register_objective("reward")
class RewardModelObjective(PairwiseObjective):
    """Bradley-Terry loss on pairs, with a scalar head."""

    head = SCORE
    shares_base = False

    def score_batch(
        self, batch: PreferenceBatch, route: ActiveAdapters | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses (pairs), and rewards, margins and lengths."""
        found = score_sequences(self.base, batch.flat, route)
        good, bad = found[batch.chosen], found[batch.rejected]
        margin = (good - bad).detach()
        lengths = torch.tensor([float(sum(example.loss_mask)) for example in batch.examples])
        facts = {
            "margin": margin,
            "accuracy": (margin > 0).float(),
            "chosen_reward": good.detach(),
            "rejected_reward": bad.detach(),
            "chosen_length": lengths[batch.chosen.cpu()],
            "rejected_length": lengths[batch.rejected.cpu()],
        }
        return -logsigmoid(good - bad), facts

    def next_command(self, folder: Path) -> None:
        """Return None: policies use a reward model, by their setting `reward_funcs`."""

    def step_workload(self) -> StepWorkload:
        """Return the sizes of an epoch's micro-batches; each sequence has one target, its score."""
        final = ("the evaluation of a reward model's calibration after the last step",)
        return pairwise_workload(self, lambda batch: len(batch.cu_seqlens) - 1, final)

    @torch.no_grad()
    def evaluate(self, route: ActiveAdapters | None) -> dict[str, Any]:
        """Return the loss and metrics of the eval pairs, with the calibration error (ratio)."""
        margins = []
        for row in self.eval_rows:
            margins.append(self.score_batch(self.collate([row], 0), route)[1]["margin"])
        return super().evaluate(route) | {
            "calibration_error": calibration_error(torch.cat(margins))
        }
