"""Preference losses from log-probabilities: one value per pair, or per labeled completion.

    w, l     log-probability of the chosen and the rejected completion, summed over its tokens
    w', l'   the same under the reference
    |w|      tokens of the completion
    h        beta ((w - w') - (l - l'))
    s        the logistic function, e the label smoothing

    dpo sigmoid   -(1 - e) log s(h) - e log s(-h)
    dpo robust    (-(1 - e) log s(h) + e log s(-h)) / (1 - 2e)
    dpo hinge     max(0, 1 - h)
    dpo ipo       ((w - w')/|w| - (l - l')/|l| - 1 / (2 beta))^2
    kto           desirable: 1 - s(beta (w - w' - z))    undesirable: 1 - s(beta (z - l + l'))
    orpo          -w/|w| - beta log s(odds(w/|w|) - odds(l/|l|))
    simpo         -log s(beta (w/|w| - l/|l|) - gamma)
    reward        -log s(r(w) - r(l))

    odds(x)      x - log(1 - e^x)
    z            mean of log p - log p' over mismatched completions, at least 0; no gradient
    sft_weight   dpo and simpo: + sft_weight (-w/|w|), against likelihood displacement

IPO is averaged over tokens, as in its authors' published code.

References:
    dpo: Rafailov et al. 2023, arXiv 2305.18290; label smoothing: Mitchell's cDPO.
    robust: Chowdhury et al. 2024, arXiv 2403.00409. hinge: Zhao et al. 2023, arXiv 2305.10425.
    ipo: Azar et al. 2023, arXiv 2310.12036. kto: Ethayarajh et al. 2024, arXiv 2402.01306.
    orpo: Hong et al. 2024, arXiv 2403.07691. simpo: Meng et al. 2024, arXiv 2405.14734.
    reward: Bradley and Terry 1952. sft_weight: Pang et al. 2024, arXiv 2404.19733.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probabilities `(n,)` of completions by policy and reference, and their token counts."""

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """Log-probability ratio of policy and reference, `(n,)`."""
        assert self.reference is not None
        return self.policy - self.reference

    @property
    def mean(self) -> Tensor:
        """Mean log-probability per token, `(n,)`."""
        return self.policy / self.tokens


def pair_losses(options: PreferenceSettings, good: AnswerLogprobs, bad: AnswerLogprobs) -> Tensor:
    """Return the dpo, orpo or simpo loss of each pair, `(num_pairs,)`."""
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
    """Return the KTO loss of each desirable and of each undesirable completion; `baseline` is z."""
    beta = options.beta
    return (
        options.desirable_weight * (1 - torch.sigmoid(beta * (good.log_ratio - baseline))),
        options.undesirable_weight * (1 - torch.sigmoid(beta * (baseline - bad.log_ratio))),
    )


def preference_metrics(
    beta: float, good: AnswerLogprobs, bad: AnswerLogprobs, single: bool
) -> dict[str, Tensor]:
    """Return rewards, margins, accuracies, log-probabilities and lengths, as TRL names them.

    A reward is beta (log p - log p'), without a reference beta log p per token. Margins are of
    pairs; the accuracy of `single` labeled completions is the ratio whose reward has the right
    sign.
    """
    chosen, rejected = (
        (beta * (a.log_ratio if a.reference is not None else a.mean)).detach() for a in (good, bad)
    )
    metrics = reward_metrics(chosen, rejected, single)
    for side, answers in (("chosen", good), ("rejected", bad)):
        metrics[f"logps/{side}"] = answers.policy.detach()
        metrics[f"{side}_length"] = answers.tokens.float()
    return metrics


def reward_metrics(chosen: Tensor, rejected: Tensor, single: bool = False) -> dict[str, Tensor]:
    """Return rewards and accuracies and, unless completions are `single`, margins of pairs."""
    sides = {"rewards/chosen": chosen, "rewards/rejected": rejected}
    if single:
        right = torch.cat([chosen > 0, rejected < 0])
        return sides | {"rewards/accuracies": right.float()}
    margins = chosen - rejected
    return sides | {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}
