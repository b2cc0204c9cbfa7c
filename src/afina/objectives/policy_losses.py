"""Learning from rewards for answers of one's own, as functions of numbers: advantages, and a loss for each token.

    r        reward of an answer, b its group (answers to one prompt), k their number
    p, p'    log-probability of a token now, and when it was drawn; q under the reference;  ratio = exp(p - p')

    grpo     A = (r - mean of b) / (deviation of b + 1e-4), or without the division           Shao et al. 2024, arXiv 2402.03300
    rloo     A = R - mean of R over the others of b,  R = r - beta sum (p' - q)         Ahmadian et al. 2024, arXiv 2402.14740
    ppo      A of each token by GAE over the rewards -beta (p' - q), the last one with r added;
             over a step, mean 0 and deviation 1                                          Schulman et al. 2017, arXiv 1707.06347
             delta[t] = r[t] + gamma V[t+1] - V[t],  A[t] = delta[t] + gamma lam A[t+1]   Schulman et al. 2015, arXiv 1506.02438

    loss     -min(ratio A, clip(ratio, 1 - c, 1 + c) A)
             grpo: + beta (exp(q - p) - (q - p) - 1)      the divergence from the reference, estimated, never negative
             ppo:  + w (V - (A + V'))^2 / 2

Losses are averaged over the tokens of a step, not answer by answer: else a long bad answer would cost no more than a short one
(Yu et al. 2025, arXiv 2503.14476).
"""

import torch
from torch import Tensor

EPSILON = 1e-4


def grpo_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Advantage of each answer, (prompts, group) as the rewards; 0 where all of a group have the same."""
    apart = rewards - rewards.mean(1, keepdim=True)
    return apart / (rewards.std(1, keepdim=True) + EPSILON) if scale else apart


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Advantage of each answer over the mean of the others, (prompts, group)."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (n) of the tokens of one answer, from rewards (n) and values (n); after it comes 0."""
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas = (rewards + gamma * following - values).tolist()
    advantages, ahead = [], 0.0
    for delta in reversed(deltas):
        ahead = delta + gamma * lam * ahead
        advantages.append(ahead)
    return torch.tensor(advantages[::-1], dtype=values.dtype, device=values.device)


def clipped_losses(
    logps: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The loss of each token (n), and whether it was clipped (n), that is, gives no gradient."""
    ratio = torch.exp(logps - old)
    plain, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, held), (held < plain).detach()


def kl_estimate(logps: Tensor, reference: Tensor) -> Tensor:
    """exp(q - p) - (q - p) - 1 of each token (n): its mean over the policy's own tokens is the KL divergence, in nats.

    Schulman, http://joschu.net/blog/kl-approx.html, k3.
    """
    apart = reference - logps
    return torch.expm1(apart) - apart


def whiten(values: Tensor) -> Tensor:
    """The same numbers (n) with mean 0 and deviation 1; of one number, 0."""
    apart = values - values.mean()
    return apart / (apart.square().mean().sqrt() + 1e-8)
