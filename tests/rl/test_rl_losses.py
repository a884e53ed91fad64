"""Losses by hand, and the averages that they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.config.rl import Level
from prts_core.rl.losses import (
    Clip,
    decoupled_policy_loss,
    divergence,
    entropy_loss,
    explained_sums,
    explained_variance,
    huber,
    log_ratio,
    policy_loss,
    proximal_log_probs,
    value_loss,
)
from prts_core.rl.means import Mean, Totals

NUMBERS = st.floats(-50, 50, allow_nan=False)


def everything(*shape: int) -> Mean:
    return Mean.over(torch.ones(*shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.5, 1.0, -1.2, 1), (1.5, -1.0, 1.5, 0), (0.5, 1.0, -0.5, 0), (0.5, -1.0, 0.8, 1), (5.0, -1.0, 3.0, 0)],
)
def test_the_clip_is_pessimistic_and_the_dual_clip_bounded(ratio, advantage, loss, clipped) -> None:
    now, was = torch.full((1, 1, 1), math.log(ratio)), torch.zeros(1, 1, 1)
    got, metrics = policy_loss(now, was, torch.tensor([[advantage]]), everything(1, 1), "chunk", Clip(0.2, 0.2, 3.0))
    assert float(got) == pytest.approx(loss, rel=1e-5)
    assert metrics["actor/clip_fraction"] == clipped
    assert metrics["actor/dual_clip_fraction"] == (ratio == 5.0)


def test_a_ratio_stands_for_a_number_an_action_or_a_chunk() -> None:
    now, was = torch.full((2, 3, 4), 0.1), torch.zeros(2, 3, 4)
    for level, times, shape in (("token", 1, (2, 3, 4)), ("action", 4, (2, 3)), ("chunk", 12, (2, 1))):
        got = log_ratio(now, was, torch.ones(2, 1, dtype=torch.bool), level)
        assert got.shape == shape
        torch.testing.assert_close(got, torch.full(shape, 0.1 * times))


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
@pytest.mark.parametrize("wide", [False, True])
def test_actions_that_were_not_executed_take_no_part(level: Level, wide: bool) -> None:
    """Half a chunk is what half a chunk would be, whether decisions or steps count."""
    random = torch.Generator().manual_seed(0)
    now, was = (torch.randn(5, 4, 2, generator=random) * 0.1 for _ in range(2))
    executed = torch.tensor([True, True, False, False]).expand(5, 4)
    mask = executed if wide else torch.ones(5, 1, dtype=torch.bool)
    advantages = torch.randn(5, 1, generator=random)
    a = policy_loss(now, was, advantages, Mean.over(mask, executed=executed), level, Clip(0.2, 0.2))
    b = policy_loss(now[:, :2], was[:, :2], advantages, everything(5, 2 if wide else 1), level, Clip(0.2, 0.2))
    torch.testing.assert_close(a[0], b[0])
    for key, value in a[1].items():
        torch.testing.assert_close(value, b[1][key])


def test_a_mean_counts_what_is_repeated_as_often() -> None:
    """Where the reference divides by what counts before it is spread over actions and their numbers."""
    x = torch.full((3, 4, 5), 2.0)
    mask = torch.tensor([[True], [True], [False]])
    assert Mean.over(mask).loss(x) == 2 and Mean.over(mask.expand(3, 4)).metric(x) == 2


def test_a_mean_with_totals_is_a_share() -> None:
    x, mask = torch.tensor([[3.0], [5.0]]), torch.ones(2, 1, dtype=torch.bool)
    assert Mean.over(mask, totals=Totals(8, 4)).loss(x) == 1 and Mean.over(mask, totals=Totals(8, 4)).metric(x) == 2


def test_episodes_of_any_length_weigh_alike() -> None:
    x, mask = torch.tensor([[1.0], [1.0], [1.0], [9.0]]), torch.ones(4, 1, dtype=torch.bool)
    assert Mean.over(mask, torch.tensor([3, 3, 3, 1])).loss(x) == 5


@pytest.mark.parametrize("mask", [False, True])
def test_huge_differences_give_finite_gradients(mask: bool) -> None:
    now = torch.tensor([[[1e4]], [[-1e4]], [[float("nan")]]], requires_grad=True)
    counts = torch.tensor([[True], [True], [mask]]) & torch.tensor([[True], [True], [False]])
    advantages = torch.tensor([[-1e3], [1e3], [float("inf")]])
    loss, _ = policy_loss(now, torch.zeros(3, 1, 1), advantages, Mean.over(counts), "token", Clip(0.2, 0.2))
    loss.backward()
    assert loss.isfinite() and now.grad is not None and now.grad.isfinite().all()


@given(NUMBERS, NUMBERS)
def test_divergence_is_never_negative_and_always_leads_back(now: float, reference: float) -> None:
    at = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    got = divergence(at, torch.tensor(reference, dtype=torch.float64))
    got.backward()
    assert got >= 0 and at.grad is not None and at.grad.isfinite()
    if abs(now - reference) > 1e-3:
        assert at.grad.sign() == math.copysign(1, now - reference)
        assert abs(float(at.grad)) <= math.exp(3)


def test_the_value_is_clipped_pessimistically_too() -> None:
    values, old, returns = (torch.tensor([[x]]) for x in (1.0, 0.0, 2.0))
    loss, metrics = value_loss(values, old, returns, everything(1, 1), 0.2, 10.0)
    assert float(loss) == pytest.approx(0.5 * 1.8**2) and metrics["critic/value_clip_ratio"] == 1
    loss, metrics = value_loss(old, old, returns, everything(1, 1), 0.2, 10.0)
    assert float(loss) == 2 and metrics["critic/value_clip_ratio"] == 0


@given(NUMBERS, st.floats(0.1, 10))
def test_huber_is_smooth_and_between_a_square_and_a_line(error: float, delta: float) -> None:
    got = float(huber(torch.tensor(error, dtype=torch.float64), delta))
    assert got <= 0.5 * error**2 + 1e-9 and got <= delta * abs(error) + 1e-9 and got >= 0


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(-1e3, 1e3))
def test_explained_variance_pools_and_ignores_an_offset(seed: int, offset: float) -> None:
    random = torch.Generator().manual_seed(seed)
    values, returns = (torch.randn(9, 2, generator=random, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(9, 2, generator=random) < 0.8
    whole = explained_variance(explained_sums(values, returns, mask))
    cut = slice(0, 4), slice(4, None)
    pooled = sum((explained_sums(values[c] + offset, returns[c], mask[c]) for c in cut), torch.zeros(5).double())
    error, target = (returns - values)[mask], returns[mask]
    torch.testing.assert_close(whole, (1 - error.var() / target.var()).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(explained_variance(pooled), whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("returns", [[], [1.0], [0.1, 0.1, 0.1]])
def test_explained_variance_of_what_does_not_vary_is_nan(returns: list[float]) -> None:
    x = torch.tensor(returns)
    assert explained_variance(explained_sums(torch.zeros_like(x), x, torch.ones_like(x).bool())).isnan()


def test_a_proximal_policy_lies_between_by_age() -> None:
    now, old = torch.ones(5, 1, 1), torch.zeros(5, 1, 1)
    got = proximal_log_probs(now, old, torch.tensor([7, 6, 4, -1, 9]), current=8)
    assert got.flatten().tolist() == [0.0, 0.5, 0.75, 0.0, 0.0] and not got.requires_grad


def test_decoupled_weights_beyond_the_limit_are_left_out() -> None:
    now = torch.zeros(2, 1, 1, requires_grad=True)
    proximal = torch.tensor([[[0.0]], [[1.0]]])
    args = now, torch.zeros(2, 1, 1), proximal, torch.ones(2, 1), everything(2, 1), "chunk", Clip(0.2, 0.2)
    loss, metrics = decoupled_policy_loss(*args, weight_limit=2.0)
    assert loss.item() == -1 and metrics["actor/behav_clip_fraction"] == 0.5
    loss.backward()
    assert now.grad is not None and now.grad.flatten().tolist() == [-1, 0]
    loss, metrics = decoupled_policy_loss(*args)
    assert loss.item() == pytest.approx(-1) and metrics["actor/behav_clip_fraction"] == 0  # -(1 + e / e) / 2


@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (3, 4, 2)])
def test_entropy_of_any_width(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1.5)
    for wide in (1, 4):
        mask = torch.ones(3, wide, dtype=torch.bool)
        mask[2] = False
        assert entropy_loss(x, Mean.over(mask))[0] == 1.5
