"""GRPO, RLOO and PPO: how the rewards of completions become advantages; see `policy_losses`."""

from dataclasses import replace

import torch
from torch import Tensor

from afina.models.causal_lm import SCORE
from afina.objectives.policy import PolicyObjective
from afina.objectives.policy_losses import gae, grpo_advantages, rloo_advantages, whiten
from afina.objectives.registry import register_objective
from afina.objectives.rollout import RolloutBatch, with_advantages
from afina.settings import GRPOSettings, PPOSettings, RLOOSettings


@register_objective("grpo")
class GRPOObjective(PolicyObjective):
    """Group-relative policy optimization: a completion against the others of its prompt."""

    options: GRPOSettings

    def assign_advantages(self, batches: list[RolloutBatch], rewards: Tensor) -> list[RolloutBatch]:
        """Return each reward relative to its group, on all tokens of the completion."""
        groups = rewards.view(-1, self.group)
        return with_advantages(batches, grpo_advantages(groups, self.options.scale_rewards))

    def penalty(
        self, batch: RolloutBatch, kl: Tensor, values: Tensor | None, metrics: dict[str, Tensor]
    ) -> Tensor | float:
        """Return beta times the KL divergence."""
        return self.options.beta * kl if self.options.beta else 0.0


@register_objective("rloo")
class RLOOObjective(PolicyObjective):
    """REINFORCE with the mean of the other completions of a prompt as the baseline."""

    options: RLOOSettings

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether completions are reused, or the KL divergence is part of the reward."""
        return super().needs_old_logprobs or self.options.beta > 0

    def assign_advantages(self, batches: list[RolloutBatch], rewards: Tensor) -> list[RolloutBatch]:
        """Return each reward, less beta times the drift, minus the mean of its group's others."""
        rewards = rewards.clone()
        for batch in batches if self.options.beta else ():
            parts = batch.drift().double().split(batch.counts.tolist())
            drift = torch.stack([part.sum() for part in parts]).cpu()
            rewards[list(batch.indices)] -= self.options.beta * drift
        return with_advantages(batches, rloo_advantages(rewards.view(-1, self.group)))


@register_objective("ppo")
class PPOObjective(PolicyObjective):
    """Proximal policy optimization, with a value head that is not saved."""

    head = SCORE
    saves_head = False
    needs_old_logprobs = True
    options: PPOSettings

    def assign_advantages(self, batches: list[RolloutBatch], rewards: Tensor) -> list[RolloutBatch]:
        """Return generalized advantage estimates, and the targets of the value head."""
        options, found = self.options, []
        for batch in batches:
            assert batch.values is not None
            token_rewards = -options.beta * batch.drift()
            last = batch.counts.cumsum(0) - 1
            token_rewards[last] += rewards[list(batch.indices)].float().to(last.device)
            counts = batch.counts.tolist()
            sides = zip(token_rewards.split(counts), batch.values.split(counts), strict=True)
            estimates = torch.cat([gae(r, v, options.gamma, options.lam) for r, v in sides])
            returns = estimates + batch.values
            found.append(replace(batch, advantages=estimates, returns=returns))
        if not options.whiten_advantages:
            return found
        sizes = [len(batch.advantages) for batch in found]
        white = whiten(torch.cat([batch.advantages for batch in found])).split(sizes)
        return [replace(one, advantages=part) for one, part in zip(found, white, strict=True)]

    def penalty(
        self, batch: RolloutBatch, kl: Tensor, values: Tensor | None, metrics: dict[str, Tensor]
    ) -> Tensor | float:
        """Return vf_coef times half the squared error of the value head."""
        if values is None or batch.returns is None:
            return 0.0
        errors = (values - batch.returns).square()
        metrics["value_loss"] = errors.detach()
        return self.options.vf_coef * errors / 2
