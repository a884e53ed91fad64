"""Set up the learner's optimiser and its rates: warm-up, schedule, and a factor that keeps an iteration's divergence
near a wanted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prts_core.config.rl import LearnerConfig, RlConfig
from prts_core.rl.state import Progress

STEER, SLOWEST, FASTEST = 1.3, 1e-3, 1e2  # of the factor that target_kl steers


def optimizer(
    learner: LearnerConfig, trained: Mapping[str, nn.Parameter], net: nn.Module | None, critic: nn.Module | None
) -> torch.optim.AdamW:
    """Groups whose "peak" is their rate and whose "policy" says whether warm-up, schedule and steering move it.

    trained: of the policy, by name; matrices alone decay. net: what exploring is learned by. critic: at its own rate.
    """
    matrices = [p for name, p in trained.items() if p.ndim >= 2 and "embed" not in name]
    others = [p for name, p in trained.items() if not (p.ndim >= 2 and "embed" not in name)]
    if net is not None:
        others += net.parameters()
    groups: list[dict[str, Any]] = [
        {"params": matrices, "peak": learner.learning_rate, "weight_decay": learner.weight_decay, "policy": True},
        {"params": others, "peak": learner.learning_rate, "weight_decay": 0.0, "policy": True},
    ]
    if critic is not None:
        of_critic = list(critic.parameters())
        groups.append({"params": of_critic, "peak": learner.value_lr, "weight_decay": 0.0, "policy": False})
    return torch.optim.AdamW(groups, lr=learner.learning_rate, betas=learner.betas, eps=learner.adam_eps)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """share: of the policy's peak rate; the critic's stays."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (share if group["policy"] else 1.0)


def rate(config: RlConfig, iteration: int, progress: Progress) -> float:
    """The policy's learning rate of the next update."""
    learner = config.learner
    low = learner.min_learning_rate / learner.learning_rate
    share = 1.0
    if learner.schedule == "cosine":
        share = low + 0.5 * (1 - low) * (1 + math.cos(math.pi * min(1.0, iteration / config.iterations)))
    rising = min(1.0, (progress.updates + 1) / learner.warmup) if learner.warmup else 1.0
    return learner.learning_rate * share * rising * progress.rate


def steer(config: RlConfig, moved: float, iteration: int, progress: Progress) -> None:
    """Make the next iteration move the policy by about target_kl; `moved`: by how much this one did."""
    wanted = config.learner.target_kl
    if wanted is None or iteration < config.algorithm.critic_warmup or not math.isfinite(moved):
        return
    if moved > 1.5 * wanted:
        progress.rate = max(SLOWEST, progress.rate / STEER)
    elif moved < wanted / 1.5:
        progress.rate = min(FASTEST, progress.rate * STEER)
