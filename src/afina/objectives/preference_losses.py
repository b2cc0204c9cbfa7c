"""The losses of preferences, as functions of log-probabilities. One number a pair, or a labelled answer.

    w, l     log p of the better and the worse answer, summed over its tokens; w', l' the same under the reference
    |w|      tokens of the answer
    h        beta ((w - w') - (l - l'))

    dpo sigmoid   -log s(h)                                    Rafailov et al. 2023, arXiv 2305.18290
                  e of the pairs the wrong way round: -(1 - e) log s(h) - e log s(-h)      (Mitchell's cDPO)
    dpo robust    (-(1 - e) log s(h) + e log s(-h)) / (1 - 2e)            Chowdhury et al. 2024, arXiv 2403.00409
    dpo hinge     max(0, 1 - h)                                           Zhao et al. 2023, arXiv 2305.10425
    dpo ipo       ((w - w')/|w| - (l - l')/|l| - 1 / (2 beta))^2          Azar et al. 2023, arXiv 2310.12036
    kto           good: 1 - s(beta (w - w' - z))    bad: 1 - s(beta (z - l + l'))    Ethayarajh et al. 2024, arXiv 2402.01306
    orpo          -w/|w| - beta log s(odds(w/|w|) - odds(l/|l|))          Hong et al. 2024, arXiv 2403.07691
    simpo         -log s(beta (w/|w| - l/|l|) - gamma)                    Meng et al. 2024, arXiv 2405.14734
    reward        -log s(r(w) - r(l))                                     Bradley and Terry 1952

    odds(x)      x - log(1 - e^x)
    z            the mean of log p - log p' over answers to other prompts, at least 0; no gradient
    sft          dpo and simpo: + sft (-w/|w|), against likelihood displacement (Pang et al. 2024, arXiv 2404.19733)

IPO is averaged over tokens, as its authors do in what they published.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from afina.settings import (
    DPOSettings,
    KTOSettings,
    ORPOSettings,
    PreferenceSettings,
    SimPOSettings,
)

NEEDS_REFERENCE = ("dpo", "kto")  # objectives with a reference


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probabilities (n) of answers under the policy and under the reference (None without one), and their tokens (n)."""

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log p - log p' (n)."""
        assert self.reference is not None
        return self.policy - self.reference

    @property
    def mean(self) -> Tensor:
        """log p a token (n)."""
        return self.policy / self.tokens


def pair_losses(
    options: PreferenceSettings, good: AnswerLogprobs, bad: AnswerLogprobs
) -> Tensor:
    """The loss of each pair (n) under dpo, orpo or simpo."""
    beta = options.beta
    if isinstance(options, ORPOSettings):
        odds = [a.mean - torch.log(-torch.expm1(a.mean.clamp(max=-1e-7))) for a in (good, bad)]
        return -good.mean - beta * logsigmoid(odds[0] - odds[1])
    assert isinstance(options, DPOSettings | SimPOSettings)
    if isinstance(options, SimPOSettings):
        losses = -logsigmoid(beta * (good.mean - bad.mean) - options.gamma)
    else:
        losses = _dpo(options, good, bad)
    return losses - options.sft_weight * good.mean if options.sft_weight else losses


def _dpo(options: DPOSettings, good: AnswerLogprobs, bad: AnswerLogprobs) -> Tensor:
    beta, wrong = options.beta, options.label_smoothing
    if options.loss_type == "ipo":
        return (good.log_ratio / good.tokens - bad.log_ratio / bad.tokens - 1 / (2 * beta)) ** 2
    margin = beta * (good.log_ratio - bad.log_ratio)
    if options.loss_type == "hinge":
        return relu(1 - margin)
    right, flipped = -(1 - wrong) * logsigmoid(margin), -wrong * logsigmoid(-margin)
    return (right - flipped) / (1 - 2 * wrong) if options.loss_type == "robust" else right + flipped


def kto_losses(
    options: KTOSettings, good: AnswerLogprobs, bad: AnswerLogprobs, baseline: Tensor
) -> tuple[Tensor, Tensor]:
    """KTO's loss of each good answer and of each bad one; `baseline` is z, a number."""
    beta = options.beta
    return (
        options.desirable_weight * (1 - torch.sigmoid(beta * (good.log_ratio - baseline))),
        options.undesirable_weight * (1 - torch.sigmoid(beta * (baseline - bad.log_ratio))),
    )


def preference_metrics(
    objective: str, options: PreferenceSettings, good: AnswerLogprobs, bad: AnswerLogprobs
) -> dict[str, Any]:
    """What is worth knowing besides the loss, a tensor each: rewards, margins, who won, log-probabilities, lengths.

    A reward is beta (log p - log p'), without a reference beta log p a token. Margins are of pairs; for labelled
    answers, accuracy is the share whose reward has the right sign.
    """
    beta = options.beta
    rewards = [
        (beta * (a.log_ratio if a.reference is not None else a.mean)).detach() for a in (good, bad)
    ]
    if objective == "kto":
        judged = {"accuracy": torch.cat([rewards[0] > 0, rewards[1] < 0]).float()}
    else:
        judged = {"margin": rewards[0] - rewards[1], "accuracy": (rewards[0] > rewards[1]).float()}
    sides = zip(("chosen", "rejected"), (good, bad), rewards, strict=True)
    return judged | {
        f"{name}_{what}": value
        for name, answers, reward in sides
        for what, value in (
            ("reward", reward),
            ("logp", answers.policy.detach()),
            ("length", answers.tokens.float()),
        )
    }
