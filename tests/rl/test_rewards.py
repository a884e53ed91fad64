"""What is earned, and that shaping moves credit without ever changing what is best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prts_core.config.rl import RewardConfig
from prts_core.rl.advantages import advantages_of_decisions
from prts_core.rl.rewards import earn, shape
from prts_core.rl.rollouts import Rollouts
from tests.rl.made import make

SEEDS = st.integers(0, 10_000)


def rewards(flags: list[list[int]], **settings_: float) -> list[list[float]]:
    """Of one episode, a row a chunk, all executed."""
    successes = torch.tensor(flags).bool()[:, None]
    earned = earn(successes, torch.ones_like(successes), RewardConfig(**settings_))  # type: ignore[arg-type]
    return earned[:, 0].tolist()


def test_a_change_is_rewarded_and_staying_is_not() -> None:
    assert rewards([[0, 1], [1, 0], [0, 1]]) == [[0, 1], [0, -1], [0, 1]]
    assert rewards([[0, 1], [1, 0]], relative=False, success=5.0) == [[0, 5], [5, 0]]
    assert rewards([[1, 0]], step_penalty=0.25) == [[0.75, -1.25]]


def test_nothing_is_earned_outside_the_mask() -> None:
    successes, mask = torch.ones(1, 1, 3).bool(), torch.tensor([[[True, False, False]]])
    for relative in (True, False):
        assert earn(successes, mask, RewardConfig(relative=relative, step_penalty=0.5)).flatten().tolist() == [
            0.5,
            0,
            0,
        ]


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.5, 1), st.sampled_from(["action", "chunk"]), st.booleans())
def test_shaping_adds_the_same_to_every_discounted_return(seed: int, gamma: float, level, bootstrapped: bool) -> None:
    """Less the first potential; and where a cut episode goes on, plus that of where it does."""
    rollouts = make(seed)
    assert rollouts.reachability is not None
    potential = rollouts.reachability[..., 0]
    shaped = shape(rollouts.earned, potential, rollouts.mask, rollouts.terminated, 2.0, gamma, level, bootstrapped)
    plain = rollouts.earned.where(rollouts.mask, 0)
    assert torch.equal((shaped != plain).any(-1) | ~rollouts.mask.any(-1), torch.ones(4, 6).bool())
    last = rollouts.mask.any(-1).sum(0)
    discount = gamma ** (rollouts.mask.sum((0, 2)) if level == "action" else last)
    rest = 2 * potential.gather(0, last[None])[0] * discount * (~rollouts.terminated if bootstrapped else 0)
    gained = _returns(rollouts, shaped, gamma, level) - _returns(rollouts, plain, gamma, level)
    torch.testing.assert_close(gained, rest - 2 * potential[0], atol=1e-4, rtol=1e-4)


def _returns(rollouts: Rollouts, paid: Tensor, gamma: float, level: str) -> Tensor:
    """Discounted sum of each episode's rewards."""
    if level == "chunk":
        return (paid.sum(-1) * gamma ** torch.arange(4)[:, None]).sum(0)
    return (paid.transpose(1, 2).flatten(0, 1) * gamma ** torch.arange(12)[:, None]).sum(0)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.5, 1), st.floats(0, 1), st.sampled_from(["action", "chunk"]))
def test_a_critic_that_knows_the_shaped_value_sees_the_same_advantages(
    seed: int, gamma: float, trace: float, level
) -> None:
    """V - Phi is the value of shaped rewards: with it every advantage is what it was, at cuts and ends too."""
    rollouts = make(seed)
    assert rollouts.reachability is not None and rollouts.values is not None
    potential = rollouts.reachability[..., 0]
    shaped = shape(rollouts.earned, potential, rollouts.mask, rollouts.terminated, 1.0, gamma, level, True)
    plain = replace(rollouts, rewards=rollouts.earned)
    a, _ = advantages_of_decisions(plain, rollouts.values, gamma, trace, level)
    b, _ = advantages_of_decisions(
        replace(rollouts, rewards=shaped), rollouts.values - rollouts.reachability, gamma, trace, level
    )
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


class World:
    """A small random world: every action of every state leads somewhere; the last state is the goal, where it ends."""

    states, actions = 6, 3

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        size = (self.states, self.actions, self.states)
        self.chance = torch.rand(size, generator=random, dtype=torch.float64) ** 3
        self.chance /= self.chance.sum(-1, keepdim=True)
        self.reward = torch.randn(size, generator=random)
        self.potential = 3 * torch.randn(self.states, generator=random)

    def paid(self, gamma: float, shaped: bool, cut: bool = False, bootstrapped: bool = True) -> Tensor:
        """(S, A, S) rewards of transitions, each an episode of one decision. cut: the limit comes after it."""
        start, _, end = torch.meshgrid(*(torch.arange(n) for n in self.reward.shape), indexing="ij")
        earned = self.reward.reshape(1, -1, 1)
        if not shaped:
            return self.reward
        potential = torch.stack([self.potential[start.flatten()], self.potential[end.flatten()]])
        mask = torch.ones_like(earned, dtype=torch.bool)
        goal = end.flatten() == self.states - 1
        goes_on = bootstrapped or not cut  # in the middle of an episode there is always a next observation
        return shape(earned, potential, mask, goal, 1.0, gamma, "chunk", goes_on).reshape(self.reward.shape)

    def worth(self, paid: Tensor, after: Tensor, gamma: float) -> Tensor:
        """(S, A): what an action is worth if states are worth `after`, the goal nothing more."""
        after = after.clone()
        after[-1] = 0
        return (self.chance * (paid.double() + gamma * after)).sum(-1)


def best(worth: Tensor) -> list[set[int]]:
    """Of every state but the goal, the actions that are best."""
    return [{a for a in range(worth.shape[1]) if row[a] > row.max() - 1e-5} for row in worth[:-1]]


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.3, 0.95))
def test_the_best_policy_of_a_world_without_limit_stays_the_best(seed: int, gamma: float) -> None:
    """Value iteration with and without shaping."""
    world, found = World(seed), []
    for shaped in (False, True):
        paid, value = world.paid(gamma, shaped), torch.zeros(world.states, dtype=torch.float64)
        for _ in range(600):
            value = world.worth(paid, value, gamma).max(-1).values
        found.append(world.worth(paid, value, gamma))
    assert best(found[0]) == best(found[1])
    moved = (found[0] - found[1])[:-1]
    torch.testing.assert_close(moved, world.potential[:-1, None].double().expand_as(moved), atol=1e-4, rtol=1e-4)


def under_a_limit(world: World, gamma: float, shaped: bool, zero_at_the_cut: bool = True) -> list[list[set[int]]]:
    """The best actions with 1, 2, 3 ... decisions left, after which the episode is cut and nothing follows."""
    value, found = torch.zeros(world.states, dtype=torch.float64), []
    for left in range(1, 6):
        paid = world.paid(gamma, shaped, cut=left == 1, bootstrapped=not zero_at_the_cut)
        worth = world.worth(paid, value, gamma)
        found.append(best(worth))
        value = worth.max(-1).values
    return found


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.3, 1))
def test_the_best_policy_under_a_limit_stays_the_best(seed: int, gamma: float) -> None:
    world = World(seed)
    assert under_a_limit(world, gamma, False) == under_a_limit(world, gamma, True)


def test_a_potential_that_is_left_at_a_final_cut_changes_what_is_best() -> None:
    """Why it must be 0 there: without a value that stands for the rest it is a prize for ending where it is high."""
    changed = 0
    for seed in range(10):
        world = World(seed)
        changed += under_a_limit(world, 0.9, True, zero_at_the_cut=False) != under_a_limit(world, 0.9, False)
    assert changed >= 5


def test_a_price_of_steps_is_paid_by_executed_steps_alone() -> None:
    rollouts = make(4)
    earned = earn(torch.zeros_like(rollouts.mask), rollouts.mask, RewardConfig(step_penalty=0.5))
    assert earned.sum((0, 2)).tolist() == pytest.approx((-0.5 * rollouts.steps_of_episode).tolist())
