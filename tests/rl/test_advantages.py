"""Laws of advantages: what they are of known worlds, who bootstraps, what groups see, one process or two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.rl.advantages import (
    advantages_of_decisions,
    count,
    gae,
    group_means,
    group_relative,
    moments,
    normalise,
)
from prts_core.rl.rollouts import RewardLevel
from tests.rl.made import in_processes, make, part, spoiled

SEEDS = st.integers(0, 10_000)
LEVELS = st.sampled_from(["action", "chunk"])


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.1, 0.99), st.floats(0, 1), LEVELS)
def test_constant_rewards_that_never_end_surprise_nobody(
    seed: int, gamma: float, trace: float, level: RewardLevel
) -> None:
    """Cut, not solved, and rightly valued: every advantage is 0, the last one too."""
    rollouts = make(seed)
    whole = torch.ones_like(rollouts.mask)
    worth = sum(gamma**k for k in range(3)) / (1 - gamma**3) if level == "action" else 3 / (1 - gamma)
    rollouts = replace(
        rollouts,
        rewards=torch.ones_like(rollouts.rewards),
        mask=whole,
        terminated=torch.zeros_like(rollouts.terminated),
    )
    assert rollouts.values is not None
    values = torch.full_like(rollouts.values, worth)
    advantages, returns = advantages_of_decisions(rollouts, values, gamma, trace, level)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-3 * worth, rtol=0)
    torch.testing.assert_close(returns, values[:-1], rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_lambda_1_is_the_return_less_the_value(seed: int, gamma: float) -> None:
    rollouts = make(seed)
    assert rollouts.values is not None
    advantages, returns = advantages_of_decisions(rollouts, rollouts.values, gamma, 1.0, "chunk")
    for episode in range(6):
        steps = int(rollouts.mask[:, episode].any(-1).sum())
        rest = 0.0 if rollouts.terminated[episode] else float(rollouts.values[steps, episode, 0])
        for at in range(steps - 1, -1, -1):
            rest = float(rollouts.rewards[at, episode][rollouts.mask[at, episode]].sum()) + gamma * rest
            assert float(returns[at, episode, 0]) == pytest.approx(rest, abs=1e-4)
            assert float(advantages[at, episode, 0]) == pytest.approx(
                rest - float(rollouts.values[at, episode, 0]), abs=1e-4
            )


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_only_a_cut_episode_goes_on_in_its_final_value(seed: int) -> None:
    rollouts = make(seed)
    assert rollouts.values is not None
    other = rollouts.values.clone()
    for episode in range(6):
        other[int(rollouts.mask[:, episode].any(-1).sum()), episode] += 1
    a, b = (advantages_of_decisions(rollouts, v, 0.9, 0.5, "chunk")[0] for v in (rollouts.values, other))
    moved = (a != b).any(0)[:, 0]
    assert torch.equal(moved, ~rollouts.terminated)
    a, b = (advantages_of_decisions(rollouts, v, 0.9, 0.5, "chunk", False)[0] for v in (rollouts.values, other))
    assert torch.equal(a, b)


@settings(max_examples=20, deadline=None)
@given(SEEDS, LEVELS)
def test_chunks_of_one_action_are_actions(seed: int, level: RewardLevel) -> None:
    rollouts = make(seed, steps=1)
    assert rollouts.values is not None
    a, b = (advantages_of_decisions(rollouts, rollouts.values, 0.9, 0.8, way) for way in ("action", level))
    torch.testing.assert_close(a, b)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.05, 1), LEVELS, st.sampled_from([float("nan"), float("inf"), 7.0]))
def test_what_was_not_executed_is_never_read(seed: int, gamma: float, level: RewardLevel, filling: float) -> None:
    rollouts = make(seed)
    pair = []
    for one in (rollouts, spoiled(rollouts, filling)):
        assert one.values is not None
        pair.append(torch.stack(advantages_of_decisions(one, one.values, gamma, 0.9, level)))
        pair.append(one.returns)
    assert torch.equal(pair[0], pair[2]) and torch.equal(pair[1], pair[3])
    assert pair[0].isfinite().all() and (pair[0][:, ~rollouts.mask.any(-1)] == 0).all()


def test_a_reward_in_the_middle_of_a_chunk_is_discounted_by_its_place() -> None:
    rollouts = make(0, decisions=2, episodes=1, steps=3)
    mask = torch.tensor([[[True, True, True]], [[True, True, False]]])
    rewards = torch.tensor([[[1.0, 2.0, 4.0]], [[8.0, 16.0, 99.0]]])
    rollouts = replace(rollouts, rewards=rewards, mask=mask, terminated=torch.tensor([True]))
    _, returns = advantages_of_decisions(rollouts, torch.zeros(3, 1, 1), 0.5, 1.0, "action")
    assert returns.flatten().tolist() == [1 + 1 + 1 + 1 + 1, 8 + 8]


def test_gae_keeps_the_precision_it_is_given() -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    assert all(out.dtype == torch.float64 for out in gae(x, x, x, x.bool(), 0.9, 0.9))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.randoms(use_true_random=False), st.floats(-5, 5))
def test_groups_see_their_own_scores_alone_in_any_order(seed: int, shuffle, shift: float) -> None:
    random = torch.Generator().manual_seed(seed)
    scores, group = torch.randn(12, generator=random), torch.arange(12) // 4
    advantages, informative = group_relative(scores, group)
    order = list(range(12))
    shuffle.shuffle(order)
    again, _ = group_relative(scores[order], group[order] + 100)
    torch.testing.assert_close(again, advantages[order], atol=1e-5, rtol=1e-5)
    moved, _ = group_relative(scores + shift * (group == 1), group)
    torch.testing.assert_close(moved, advantages, atol=1e-4, rtol=1e-4)
    assert informative.all()
    torch.testing.assert_close(advantages.reshape(3, 4).sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages.reshape(3, 4).std(1), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(group_means(scores, group), scores.reshape(3, 4).mean(1).repeat_interleave(4))


@pytest.mark.parametrize("scores", [[0.1] * 3 + [0.7], [0.3, 0.3, 0.3, 1e6], [1.0, 1.0, 1.0, 0.0]])
def test_groups_that_say_nothing_have_advantage_0(scores: list[float]) -> None:
    """Alike, although their mean is rounded; alone."""
    advantages, informative = group_relative(torch.tensor(scores), torch.tensor([5, 5, 5, 9]))
    assert advantages.tolist() == [0.0] * 4 and not informative.any()


def test_no_episodes_at_all() -> None:
    advantages, informative = group_relative(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(advantages) == len(informative) == len(group_means(advantages, informative.long())) == 0


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(0, 24), st.sampled_from([0.0, 1e6]))
def test_normalised_to_mean_0_and_deviation_1_whatever_the_mask(seed: int, counted: int, offset: float) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, dtype=torch.float64, generator=random) + offset
    mask = torch.randperm(24, generator=random).reshape(4, 6) < counted
    got = normalise(x.where(mask, torch.nan), mask)
    assert got.isfinite().all() and (got[~mask] == 0).all()
    if counted < 2:
        assert (got == 0).all()
    else:
        assert float(got[mask].mean()) == pytest.approx(0, abs=1e-6)
        assert float(got[mask].std()) == pytest.approx(1, abs=1e-3)


def test_what_is_all_alike_is_0() -> None:
    assert (normalise(torch.full((7, 1), 0.1), torch.ones(7, 1, dtype=torch.bool)).abs() < 1e-6).all()


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.integers(0, 6))
def test_two_processes_normalise_as_one(seed: int, cut: int) -> None:
    rollouts = make(seed)
    assert rollouts.values is not None
    whole = normalise(rollouts.values[:-1], rollouts.mask)
    halves = [part(rollouts, slice(0, cut)), part(rollouts, slice(cut, None))]
    got = in_processes([lambda reduce, h=h: normalise(h.values[:-1], h.mask, reduce) for h in halves])
    torch.testing.assert_close(torch.cat(got, 1), whole)
    counts = in_processes([lambda reduce, h=h: count(h.mask, reduce) for h in halves])
    assert counts == [count(rollouts.mask)] * 2
    sums = in_processes([lambda reduce, h=h: torch.stack(moments(h.rewards, h.mask, reduce)) for h in halves])
    torch.testing.assert_close(sums[0], torch.stack(moments(rollouts.rewards, rollouts.mask)))
