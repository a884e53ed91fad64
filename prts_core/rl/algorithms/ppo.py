"""Learn by proximal policy optimisation: generalised advantages, clipped actor and critic (arXiv:1707.06347)."""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.advantages import advantages_of_decisions, moments, normalise
from prts_core.rl.algorithms import Evaluated, Samples, Targets
from prts_core.rl.losses import Clip, Metrics, entropy_loss, kl_loss, policy_loss, value_loss
from prts_core.rl.rollouts import Reduce, Rollouts, entries_of_episode

NEEDS = frozenset({"values"})


def targets(rollouts: Rollouts, config: AlgorithmConfig, reduce: Reduce | None = None) -> Targets:
    """Advantages and returns of decisions; the mask is reward_level's, and returns are those before normalising."""
    assert rollouts.values is not None, "a critic's values are among NEEDS"
    advantages, returns = advantages_of_decisions(
        rollouts, rollouts.values, config.gamma, config.gae_lambda, config.reward_level, config.bootstrap
    )
    mask = rollouts.loss_mask(config.reward_level)
    if config.normalize_advantages:
        advantages = normalise(advantages, mask, reduce)
    # Where every step earned the same, as where nothing was, advantages are the critic's errors and nothing else.
    _, _, spread = moments(rollouts.rewards, rollouts.mask, reduce)
    return Targets(advantages, returns, mask, entries_of_episode(mask), informative=float(spread) > 0)


def loss(now: Evaluated, was: Samples, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """Actor and critic, less the entropy's bonus, plus the divergence from the policy that the run started from."""
    assert now.log_probs is not None and was.log_probs is not None
    clip = Clip(config.clip_low, config.clip_high, config.dual_clip)
    actor = policy_loss(now.log_probs, was.log_probs, was.advantages, was.mean, config.log_prob_level, clip)
    return total(*actor, now, was, config)


def total(
    actor: Tensor, metrics: Metrics, now: Evaluated, was: Samples, config: AlgorithmConfig
) -> tuple[Tensor, Metrics]:
    """An actor's loss and metrics with everything that is added to them. actor/total_loss is what goes down."""
    mean = was.mean
    weight = 0.0 if was.critic_only else 1.0
    loss = weight * actor
    if now.values is not None:
        assert was.values is not None and was.returns is not None
        critic, more = value_loss(now.values, was.values, was.returns, was.even, config.value_clip, config.huber_delta)
        loss, metrics = loss + config.value_weight * critic, metrics | more
    if now.entropy is not None:
        entropy, more = entropy_loss(now.entropy, mean)
        loss, metrics = loss - weight * config.entropy_bonus * entropy, metrics | more
    if was.reference_log_probs is not None:
        assert now.log_probs is not None
        divergence, more = kl_loss(now.log_probs, was.reference_log_probs, mean)
        loss, metrics = loss + weight * config.kl_weight * divergence, metrics | more
    metrics["actor/total_loss"] = loss.detach()
    nothing = mean.mask.sum() == 0 if mean.totals is None else torch.as_tensor(mean.totals.count) == 0
    metrics["actor/no_information"] = nothing.float()
    return loss, metrics
