"""A reward model: a number for an answer, learned from which of two is better.

    r(answer) = v . h          h the hidden state at its last token, v a head that starts at zero and is the adapter's own
    P(w before l) = s(r(w) - r(l)),   loss = -log P                    Bradley and Terry 1952; Ouyang et al. 2022, 2203.02155

The base keeps its output layer, so that one model in memory is policy and judge: which of them acts is a matter of the route.
Calibration is the expected error of P, as a share: of the pairs of which it is 80% sure, it should be right on 80%
(Guo et al. 2017, arXiv 1706.04599; ten bins from a half to one).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from afina.base.model import SCORE, Base
from afina.data.batches import FlatBatch
from afina.objective.choices import ChoiceBatch, ChoiceTask
from afina.objective.reading import Reading
from afina.objective.reference import table_of
from afina.route.invocation import Route
from afina.segments import BASE

BINS = 10


def rewards(base: Base, batch: FlatBatch, route: Route | None) -> Tensor:
    """The reward of each sequence of a flat run (sequences), float32; without an adapter it is 0."""
    table = table_of(batch, route)
    lean = Reading(base, batch, table).lean(table)
    with base.board.route(lean.table):
        hidden = base.hidden(lean.tokens, lean.positions, lean.flat)[lean.places([end - 1 for end in batch.bounds[1:]])]
    # the last token comes after any invocation: there the head acts on all that is left
    with base.board.route(BASE if route is None else route.everywhere().segments(batch.tokens, batch.bounds)):
        return base.model.get_submodule(SCORE)(hidden.float())[:, 0]


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error, 0 to 1, of s(|margin|) as the probability that a positive margin is right; margins (n)."""
    sure = torch.sigmoid(margins.abs().double())
    right = (margins > 0).double()
    bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = [(right[bins == b].sum() - sure[bins == b].sum()).abs() for b in range(BINS)]
    return float(torch.stack(gaps).sum() / len(margins))


class RewardTask(ChoiceTask):
    """Bradley and Terry on pairs."""

    def judge(self, batch: ChoiceBatch, route: Route | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses (pairs), and rewards, margins and lengths."""
        found = rewards(self.base, batch.flat, route)
        good, bad = found[batch.good], found[batch.bad]
        margin = (good - bad).detach()
        lengths = torch.tensor([float(sum(example.labels)) for example in batch.examples])
        facts = {
            "margin": margin, "accuracy": (margin > 0).float(), "chosen_reward": good.detach(), "rejected_reward": bad.detach(),
            "chosen_length": lengths[batch.good.cpu()], "rejected_length": lengths[batch.bad.cpu()],
        }  # fmt: skip
        return -logsigmoid(good - bad), facts

    @torch.no_grad()
    def facts(self, route: Route | None) -> dict[str, float]:
        """Means over the held-out pairs, and the calibration error of its probabilities."""
        margins = []
        for row in self.held:
            margins.append(self.judge(self.make_batch([row], 0), route)[1]["margin"])
        return super().facts(route) | {"calibration_error": calibration_error(torch.cat(margins))}
