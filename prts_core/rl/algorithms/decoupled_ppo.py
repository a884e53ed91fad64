"""Learn by PPO from rollouts of older policies: the clip is around a policy in between (arXiv:2110.00641)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.algorithms import Evaluated, Samples, Targets, ppo
from prts_core.rl.losses import Clip, Metrics, decoupled_policy_loss, proximal_log_probs
from prts_core.rl.rollouts import Reduce, Rollouts

NEEDS = frozenset({"values"})


def targets(rollouts: Rollouts, config: AlgorithmConfig, reduce: Reduce | None = None) -> Targets:
    """Those of PPO."""
    return ppo.targets(rollouts, config, reduce)


def staleness(version: Tensor, current_version: int) -> Tensor:
    """How many updates older than this iteration's start the policy was that took a decision: 0 on policy."""
    return current_version - 1 - version


def loss(now: Evaluated, was: Samples, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """PPO's loss with a decoupled actor; decisions of policies staler than max_staleness do not count."""
    assert now.log_probs is not None and was.log_probs is not None
    fresh = staleness(was.version, was.current_version) <= config.max_staleness
    was = replace(was, mask=was.mask & fresh[:, None])
    assert was.log_probs is not None
    proximal = was.proximal_log_probs
    if proximal is None:
        proximal = proximal_log_probs(now.log_probs, was.log_probs, was.version, was.current_version)
    mean = was.mean
    actor, metrics = decoupled_policy_loss(
        now.log_probs,
        was.log_probs,
        proximal,
        was.advantages,
        mean,
        config.log_prob_level,
        Clip(config.clip_low, config.clip_high, config.dual_clip),
        config.weight_limit,
    )
    metrics["actor/average_version"] = mean.metric(was.version.float()[:, None])
    metrics["actor/current_version"] = mean.metric(was.version.new_full((len(fresh), 1), was.current_version).float())
    return ppo.total(actor, metrics, now, was, config)
