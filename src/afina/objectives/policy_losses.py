"""Policy gradient losses: advantages and a loss per token.

    r        reward of a completion, b its group (completions of one prompt), k the group's size
    p, p'    log-probability of a token under the policy now, and when it was sampled
    q        its log-probability under the reference; ratio = exp(p - p')

    grpo     A = (r - mean of b) / (std of b + 1e-4), or without the division
    rloo     A = R - mean of R over the others of b,  R = r - beta sum (p' - q)
    ppo      A of each token by GAE over the rewards -beta (p' - q), the last one with r added;
             standardized over a step
             delta[t] = r[t] + gamma V[t+1] - V[t],  A[t] = delta[t] + gamma lam A[t+1]

    loss     -min(ratio A, clip(ratio, 1 - c, 1 + c) A)
             grpo: + beta (exp(q - p) - (q - p) - 1)   estimate of the KL divergence, >= 0
             ppo:  + vf_coef (V - (A + V'))^2 / 2

Losses are averaged over the tokens of a step, not per completion: otherwise a long completion
with a low reward would cost no more than a short one (Yu et al. 2025).

References:
    grpo: Shao et al. 2024, arXiv 2402.03300. rloo: Ahmadian et al. 2024, arXiv 2402.14740.
    ppo: Schulman et al. 2017, arXiv 1707.06347. GAE: Schulman et al. 2015, arXiv 1506.02438.
    Mean over tokens: Yu et al. 2025, arXiv 2503.14476.
"""

import torch
from torch import Tensor

EPSILON = 1e-4


def grpo_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Return advantages `(num_prompts, group_size)`; 0 in a group of equal rewards."""
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + EPSILON) if scale else centered


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean of its group's others, `(num_prompts, group_size)`."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Return generalized advantage estimates `(num_tokens,)` of one completion.

    Args:
        rewards: `(num_tokens,)`.
        values: `(num_tokens,)`; the value after the last token is 0.
        gamma: discount factor.
        lam: decay of the estimates.
    """
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
    """Return loss and clipping `(num_tokens,)` of each token; clipped ones have no gradient."""
    ratio = torch.exp(logps - old)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).detach()


def kl_estimate(logps: Tensor, reference: Tensor) -> Tensor:
    """Return exp(q - p) - (q - p) - 1 of each token `(num_tokens,)`.

    Its mean over tokens that the policy sampled is the KL divergence from the reference, in nats.

    References:
        Schulman, http://joschu.net/blog/kl-approx.html, estimator k3.
    """
    log_ratio = reference - logps
    return torch.expm1(log_ratio) - log_ratio


def whiten(values: Tensor) -> Tensor:
    """Return `values` `(n,)` with mean 0 and standard deviation 1; a single value gives 0."""
    centered = values - values.mean()
    return centered / (centered.square().mean().sqrt() + 1e-8)
