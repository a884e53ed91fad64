"""Estimate how much better an action was than expected: generalised, group-relative; normalised over all that counts.

Generalised advantage estimation: arXiv:1506.02438. Group-relative: arXiv:2402.03300, of whole episodes. A statistic
that needs two values gives an advantage of 0 where there is one, never NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.rl.rollouts import Reduce, RewardLevel, Rollouts, masked

EPS, GROUP_EPS = 1e-5, 1e-6


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    goes_on: Tensor,
    gamma: float,
    gae_lambda: float,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (T, ...), backwards in time:

        delta_t = r_t + gamma^n_t V(s_{t+1}) - V_t;  A_t = delta_t + (gamma lambda)^n_t goes_on_t A_{t+1};  R = A + V

    rewards, values (T, ...). next_values (T, ...): of what follows the step: 0 after an end, the final observation's
    after a cut. goes_on (T, ...) bool: the step t+1 belongs to the same episode. steps (T, ...): n_t, how long an entry
    lasts (a decision of several actions; Sutton, Precup & Singh 1999); none: 1.
    """
    discount: float | Tensor = gamma if steps is None else torch.pow(gamma, steps.to(values.dtype))
    trace: float | Tensor = (
        gamma * gae_lambda if steps is None else torch.pow(gamma * gae_lambda, steps.to(values.dtype))
    )
    delta = rewards + discount * next_values - values
    carried = trace * goes_on.to(values.dtype)
    advantages, later = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        later = delta[t] + carried[t] * later
        advantages[t] = later
    return advantages, advantages + values


def advantages_of_decisions(
    rollouts: Rollouts,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    level: RewardLevel,
    bootstrap: bool = True,
) -> tuple[Tensor, Tensor]:
    """Generalised (advantages, returns), both (C, B, 1), 0 where there was no decision.

    values (C+1, B, 1) as of `Rollouts`. A critic knows the observation of a decision and none between its actions, so
    an advantage is the decision's. level "chunk": its reward is the sum over its actions, and gamma, gae_lambda are a
    decision's. "action": they are a step's, a decision of n steps is discounted by gamma^n, its rewards by their place.
    bootstrap: an episode that was cut goes on in the value of its final observation; else that is an end as well.
    """
    mask = rollouts.mask
    decided = mask.any(-1)  # (C, B)
    rewards = masked(rollouts.rewards, mask)
    steps = None
    if level == "action":
        place = torch.arange(mask.shape[-1], device=mask.device, dtype=rewards.dtype)
        rewards, steps = rewards * torch.pow(gamma, place), mask.sum(-1)
    follows = torch.cat([decided[1:], torch.zeros_like(decided[:1])])
    over = decided & ~follows & (rollouts.terminated if bootstrap else torch.ones_like(rollouts.terminated))
    now, later = masked(values[:-1, :, 0], decided), masked(values[1:, :, 0], decided & ~over)
    advantages, returns = gae(rewards.sum(-1), now, later, follows, gamma, gae_lambda, steps)
    return masked(advantages, decided)[..., None], masked(returns, decided)[..., None]


def group_relative(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages (B,), informative (B,) bool): (score - mean) / (deviation + 1e-6) within each group.

    scores (B,); group (B,) int64, in any order. The deviation is the sample's (ddof 1). A group of one and a group
    whose scores are all alike say nothing about what to do: advantage 0, not informative.
    """
    _, member = torch.unique(group, return_inverse=True)
    exact, groups = scores.double(), int(member.max()) + 1 if len(member) else 0
    zeros = torch.zeros(groups, dtype=torch.float64, device=scores.device)
    count = zeros.index_add(0, member, torch.ones_like(exact))
    away = exact - (zeros.index_add(0, member, exact) / count)[member]
    variance = zeros.index_add(0, member, away.square()) / (count - 1).clamp(min=1)
    highest, lowest = (zeros.scatter_reduce(0, member, exact, way, include_self=False) for way in ("amax", "amin"))
    informative = (highest > lowest)[member]
    advantages = away / (variance.sqrt()[member] + GROUP_EPS)
    return masked(advantages, informative).to(scores.dtype), informative


def group_means(scores: Tensor, group: Tensor) -> Tensor:
    """(B,): the mean score of each episode's group."""
    _, member = torch.unique(group, return_inverse=True)
    zeros = torch.zeros(int(member.max()) + 1 if len(member) else 0, dtype=torch.float64, device=scores.device)
    sums, counts = (zeros.index_add(0, member, x) for x in (scores.double(), torch.ones_like(scores.double())))
    return (sums / counts)[member].to(scores.dtype)


def moments(x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, centred sum of squares) of what the mask keeps, in float64 and over all processes.

    The mean is summed first and the squares around it after, so that a large mean costs no digits: two reductions.
    """
    x, mask = torch.broadcast_tensors(x, mask)
    exact = masked(x.double(), mask)
    reduce = reduce or (lambda sums: sums)
    number, total = reduce(torch.stack([mask.sum().double(), exact.sum()]))
    mean = total / number.clamp(min=1)
    (squares,) = reduce(masked((exact - mean).square(), mask).sum()[None])
    return number, mean, squares


def count(mask: Tensor, reduce: Reduce | None = None) -> int:
    """How many entries of the mask are true, in all processes."""
    own = mask.sum().double()[None]
    return int(own if reduce is None else reduce(own))


def normalise(x: Tensor, mask: Tensor, reduce: Reduce | None = None, *, eps: float = EPS, ddof: int = 1) -> Tensor:
    """(x - mean) / (deviation + eps) where the mask is true, 0 elsewhere; mean and deviation over all that counts.

    x is spread over the mask where that is finer.

    reduce: sums a float64 tensor over the processes, all of which must call: each then gives the numbers that one
    process with everything would. One entry, or none, gives 0.
    """
    number, mean, squares = moments(x, mask, reduce)
    deviation = (squares / (number - ddof).clamp(min=1)).sqrt()
    scaled = (x.double() - mean) / (deviation + eps)
    return masked(scaled, mask & (number > 1)).to(x.dtype)
