"""Learn from what an expert would have done at the states that the policy itself visited (DAgger, arXiv:1011.0686)."""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.advantages import count
from prts_core.rl.algorithms import Evaluated, Samples, Targets, recap
from prts_core.rl.losses import Metrics
from prts_core.rl.rollouts import Reduce, Rollouts, entries_of_episode

NEEDS = frozenset({"expert", "imitation"})


def targets(rollouts: Rollouts, config: AlgorithmConfig, reduce: Reduce | None = None) -> Targets:
    """Every decision counts alike; there is nothing to compare."""
    mask = rollouts.loss_mask("chunk")
    nothing = torch.zeros(mask.shape, device=mask.device)
    return Targets(nothing, None, mask, entries_of_episode(mask), informative=count(mask, reduce) > 0)


def loss(now: Evaluated, was: Samples, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """The mean supervised loss on the expert's actions."""
    return recap.imitation(now, was)
