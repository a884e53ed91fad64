"""Learn from all of one's own experience by imitating it with a word on how good it was (RECAP, arXiv:2511.14759).

Decisions with the best advantages are called good; the policy is trained on every decision with that word in its prompt
(now and then without), and asked for good ones when it acts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.advantages import advantages_of_decisions, count, moments
from prts_core.rl.algorithms import Evaluated, Samples, Targets
from prts_core.rl.losses import Metrics
from prts_core.rl.rollouts import Reduce, Rollouts, entries_of_episode, masked

NEEDS = frozenset({"reachability", "imitation"})
HALVINGS, ROUNDING = 64, 1e-6


def targets(rollouts: Rollouts, config: AlgorithmConfig, reduce: Reduce | None = None) -> Targets:
    """Advantages: what was earned from a decision on, undiscounted, less the goal's reachability before it.

    good: at most positive_share of all decisions, best advantage first; alike ones are all in or all out.
    """
    rollouts, values = replace(rollouts, rewards=rollouts.earned), rollouts.reachability
    assert values is not None, "reachability is among NEEDS"
    # Reachability is the chance of success, however late: gamma and lambda 1 give what came of it, less that chance.
    advantages, returns = advantages_of_decisions(rollouts, values, 1.0, 1.0, "chunk", config.bootstrap)
    mask = rollouts.loss_mask("chunk")
    limit = threshold(advantages, mask, config.positive_share, reduce)
    good = mask & (advantages.double() > limit)
    _, share, _ = moments(good.double(), mask, reduce)
    return Targets(
        advantages,
        returns,
        mask,
        entries_of_episode(mask),
        {"rollout/good": float(share), "rollout/good_from": float(limit)},
        good[..., 0],
        informative=count(mask, reduce) > 0,
    )


def threshold(x: Tensor, mask: Tensor, share: float, reduce: Reduce | None = None) -> Tensor:
    """The least number that at most `share` of what counts, in all processes, exceeds: 0-d float64.

    By halving, so that sums over the processes suffice.
    """
    number, mean, squares = moments(x, mask, reduce)
    reach = squares.sqrt() + 1e-6 * (1 + mean.abs())  # no value is further from the mean (Samuelson's inequality)
    low, high = mean - reach, mean + reach
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = (mask & (x.double() > middle)).sum().double()[None]
        fits = (above if reduce is None else reduce(above))[0] <= share * number + ROUNDING
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return high


def loss(now: Evaluated, was: Samples, config: AlgorithmConfig) -> tuple[Tensor, Metrics]:
    """The mean supervised loss of the decisions; the prompt says which are good (was.good), as the caller saw to."""
    loss, metrics = imitation(now, was)
    if was.good is not None:
        metrics["actor/good"] = was.mean.metric(was.good.float()[:, None])
    return loss, metrics


def imitation(now: Evaluated, was: Samples) -> tuple[Tensor, Metrics]:
    """The mean supervised loss of the decisions that count, every decision alike."""
    assert now.imitation is not None, "the supervised loss is among NEEDS"
    loss = was.even.loss(masked(now.imitation[:, None], was.mask))
    return loss, {"actor/imitation_loss": loss.detach(), "actor/total_loss": loss.detach()}
