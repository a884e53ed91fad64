"""Reward what a simulator saw: solved steps, their change, a price of every step, and progress towards the goal.

Shaping by a potential never changes which policy is best (Ng, Harada & Russell 1999): it is added as gamma Phi(s') -
Phi(s) with Phi 0 at an end, so that a whole episode gains the same whatever it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.config.rl import RewardConfig
from prts_core.rl.rollouts import RewardLevel, masked


def earn(successes: Tensor, mask: Tensor, config: RewardConfig) -> Tensor:
    """(C, B, K) float32: what each step earned, unshaped, 0 where the mask is false.

    successes, mask (C, B, K) bool: the task was solved after the step; the step counts (rollouts.py). Relative: the
    change of the step before, 0 before an episode's first; without `relative` every step in a solved task earns.
    """
    levels = config.success * (successes & mask).float()
    if config.relative:
        flat = levels.transpose(1, 2).flatten(0, 1)  # (C*K, B): steps in their order
        change = flat - torch.cat([torch.zeros_like(flat[:1]), flat[:-1]])
        levels = change.reshape(levels.shape[0], levels.shape[2], levels.shape[1]).transpose(1, 2)
    return masked(levels - config.step_penalty, mask)


def shape(
    earned: Tensor,
    potential: Tensor,
    mask: Tensor,
    terminated: Tensor,
    weight: float,
    gamma: float,
    level: RewardLevel,
    bootstrapped: bool,
) -> Tensor:
    """(C, B, K): `earned` with weight (gamma Phi(s') - Phi(s)) added to the first step of every decision.

    potential (C+1, B): Phi of each decision's observation, and in the row after an episode's last decision of its final
    one. terminated (B,) bool. level: gamma is a decision's ("chunk") or a step's ("action": gamma^n for n steps).

    Where an episode was solved Phi(s') is 0. Where it was cut it depends on what follows in the learner's eyes.
    bootstrapped: the value of the final observation stands for the rest; that value, learned from shaped rewards, has
    -Phi(s') in it, which Phi(s') must undo. Else the cut is an end like any other, and Phi(s') is 0.
    """
    decided = mask.any(-1)
    follows = torch.cat([decided[1:], torch.zeros_like(decided[:1])])
    over = ~follows & (terminated if bootstrapped else torch.ones_like(terminated))
    before, after = masked(potential[:-1], decided), masked(potential[1:], decided & ~over)
    discount = torch.pow(gamma, mask.sum(-1).to(earned.dtype)) if level == "action" else gamma
    rewards = masked(earned, mask).clone()
    rewards[..., 0] += weight * (discount * after - before)
    return rewards
