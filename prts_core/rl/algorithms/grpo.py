"""Learn by comparing episodes of one initial state with each other, without a critic (GRPO, arXiv:2402.03300)."""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.advantages import count, group_means, group_relative, moments
from prts_core.rl.algorithms import Evaluated, Samples, Targets, ppo
from prts_core.rl.losses import Metrics
from prts_core.rl.rollouts import Reduce, Rollouts, entries_of_episode, masked

NEEDS = frozenset({"groups"})


def targets(rollouts: Rollouts, config: AlgorithmConfig, reduce: Reduce | None = None) -> Targets:
    """Every decision of an episode has the episode's advantage, (C, B, 1).

    The score is what was earned, before any shaping: an outcome as a whole needs no credit moved within it. Left out
    are groups that say nothing (one member, scores all alike) and those whose mean score is outside filter_returns.
    """
    scores = rollouts.returns
    advantages, informative = group_relative(scores, rollouts.group)
    if config.filter_returns is not None:
        low, high = config.filter_returns
        means = group_means(scores, rollouts.group)
        informative = informative & (means >= low) & (means <= high)
    mask = rollouts.loss_mask(config.reward_level) & informative[None, :, None]
    spread = masked(advantages[None, :, None].expand(*mask.shape[:2], 1), mask.any(-1, keepdim=True))
    _, share, _ = moments(informative.double(), torch.ones_like(informative), reduce)
    return Targets(
        spread,
        None,
        mask,
        entries_of_episode(mask),
        {"rollout/informative_episodes": float(share)},
        informative=count(mask, reduce) > 0,
    )


def loss(now: Evaluated, was: Samples, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """The clipped actor alone, less the entropy's bonus, plus the divergence from the start. Nothing counts: 0."""
    return ppo.loss(now, was, config)
