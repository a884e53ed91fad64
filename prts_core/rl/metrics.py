"""Sum up an iteration for the log: what was rewarded, what episodes came to, and the losses of an update.

Names are those of RLinf where it has the number, with the prefix of where it comes from: rollout/, env/, actor/,
critic/. Every mean is over what counts in all processes, whichever way it lies in them; NaN where nothing does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prts_core.rl.algorithms import Targets
from prts_core.rl.losses import SUMS, Metrics, explained_variance
from prts_core.rl.rollouts import Reduce, Rollouts, masked

Reduced = Callable[[Tensor], Tensor]


def pool(parts: Sequence[Metrics], reduce: Reduce | None = None) -> dict[str, float]:
    """Numbers of an update from the shares of its micro-batches, which all have the same names, in all processes."""
    keys = sorted(parts[0])
    shares = torch.stack([torch.stack([part[key].double() for key in keys]) for part in parts]).sum(0)
    whole = dict(zip(keys, shares if reduce is None else reduce(shares), strict=True))
    if "critic/sum_count" in whole:
        whole["critic/explained_variance"] = explained_variance(
            torch.stack([whole.pop(f"critic/sum_{name}") for name in SUMS])
        )
    if "actor/no_information" in whole:
        whole["actor/no_information"] = whole["actor/no_information"].clamp(max=1)
    return {key: float(value) for key, value in whole.items()}


def mean_of(x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> float:
    """The mean of x where the (broadcast) mask is true."""
    x, mask = torch.broadcast_tensors(x, mask)
    sums = torch.stack([masked(x.double(), mask).sum(), mask.sum().double()])
    total, number = (sums if reduce is None else reduce(sums)).tolist()
    return total / number if number else float("nan")


def highest(x: Tensor, mask: Tensor, reduce_max: Reduced | None = None) -> float:
    """The greatest x where the (broadcast) mask is true."""
    x, mask = torch.broadcast_tensors(x, mask)
    least = torch.full((1,), -torch.inf, dtype=torch.float64, device=x.device)
    top = torch.cat([least, x[mask].double()]).max()[None]
    value = float(top if reduce_max is None else reduce_max(top))
    return float("nan") if value == -torch.inf else value


def spread(
    name: str, x: Tensor, mask: Tensor, reduce: Reduce | None = None, reduce_max: Reduced | None = None
) -> dict[str, float]:
    """{name_mean, name_max, name_min} of x where the mask is true."""
    return {
        f"{name}_mean": mean_of(x, mask, reduce),
        f"{name}_max": highest(x, mask, reduce_max),
        f"{name}_min": -highest(-x, mask, reduce_max),
    }


def rollout_metrics(
    rollouts: Rollouts, targets: Targets, reduce: Reduce | None = None, reduce_max: Reduced | None = None
) -> dict[str, float]:
    """rollout/rewards (a step's mean, as learned from), rollout/advantages_* and, of a critic, rollout/returns_*."""
    numbers = {"rollout/rewards": mean_of(rollouts.rewards, rollouts.mask, reduce)}
    numbers |= spread("rollout/advantages", targets.advantages, targets.mask, reduce, reduce_max)
    if targets.returns is not None:
        numbers |= spread("rollout/returns", targets.returns, targets.mask, reduce, reduce_max)
    return numbers | targets.metrics


def episode_metrics(rollouts: Rollouts, reduce: Reduce | None = None) -> dict[str, float]:
    """Means over episodes: env/success_once, env/return (earned, before shaping), env/episode_len (steps), env/reward
    (an episode's return a step)."""
    steps = rollouts.steps_of_episode
    begun = steps > 0
    return {
        "env/success_once": mean_of(rollouts.terminated, begun, reduce),
        "env/return": mean_of(rollouts.returns, begun, reduce),
        "env/episode_len": mean_of(steps, begun, reduce),
        "env/reward": mean_of(rollouts.returns / steps.clamp(min=1), begun, reduce),
    }


def staleness_metrics(
    rollouts: Rollouts, current_version: int, most: int, reduce: Reduce | None = None
) -> dict[str, float]:
    """rollout/data_staleness_<n>/ratio for n from 0 to `most`: the share of decisions by a policy n updates older than
    the newest one that can act, current_version - 1."""
    decided = rollouts.mask.any(-1)
    behind = current_version - 1 - rollouts.version
    return {
        f"rollout/data_staleness_{n}/ratio": mean_of((behind == n).double(), decided, reduce) for n in range(most + 1)
    }
