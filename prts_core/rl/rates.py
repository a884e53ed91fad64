"""Set the learner's rates: warm-up, schedule, and a factor that keeps an iteration's divergence near a wanted one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prts_core.config.rl import RlConfig
from prts_core.rl.state import Progress

STEER, SLOWEST, FASTEST = 1.3, 1e-3, 1e2  # of the factor that target_kl steers


def rate(config: RlConfig, iteration: int, progress: Progress) -> float:
    """The policy's learning rate of the next update."""
    learner = config.learner
    low = learner.min_learning_rate / learner.learning_rate
    share = 1.0
    if learner.schedule == "cosine":
        share = low + 0.5 * (1 - low) * (1 + math.cos(math.pi * min(1.0, iteration / config.iterations)))
    rising = min(1.0, (progress.updates + 1) / learner.warmup) if learner.warmup else 1.0
    return learner.learning_rate * share * rising * progress.rate


def steer(config: RlConfig, divergences: Sequence[float], iteration: int, progress: Progress) -> None:
    """Make the next iteration move the policy by about target_kl, from the divergence of each update of this one."""
    wanted = config.learner.target_kl
    if wanted is None or iteration < config.algorithm.critic_warmup or not divergences:
        return
    moved = abs(divergences[-1])
    if moved > 1.5 * wanted:
        progress.rate = max(SLOWEST, progress.rate / STEER)
    elif moved < wanted / 1.5:
        progress.rate = min(FASTEST, progress.rate * STEER)
