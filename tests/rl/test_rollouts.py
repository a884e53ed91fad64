"""Where episodes end, and what counts of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.rl.rollouts import end_at, entries_of_episode, masked
from tests.rl.made import make


def test_an_episode_ends_with_the_step_that_solved_it() -> None:
    solved = torch.tensor([[[0, 1, 1]], [[1, 0, 0]]]).bool()  # C 2, B 1, K 3; the chunk went on, and so did the next
    dones, mask, terminated = end_at(solved, torch.ones(2, 1, 3, dtype=torch.bool))
    assert mask[:, 0].tolist() == [[True, True, False], [False, False, False]]
    assert dones[:, 0].int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert terminated.tolist() == [True]


def test_an_episode_that_nothing_ends_is_cut_after_its_last_step() -> None:
    executed = torch.tensor([[[1, 1, 1], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]]).bool()
    dones, mask, terminated = end_at(torch.zeros_like(executed), executed)
    assert torch.equal(mask, executed) and not terminated.any()
    assert dones.nonzero().tolist() == [[2, 0, 0]]  # the other environment did nothing at all


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_counts_agree(seed: int) -> None:
    rollouts = make(seed)
    assert (rollouts.dones.sum((0, 2)) == 1).all()
    decisions = rollouts.loss_mask("chunk")
    assert torch.equal(decisions.sum((0, 2)), (rollouts.steps_of_episode + 2) // 3)
    assert torch.equal(entries_of_episode(rollouts.loss_mask("action"))[0], rollouts.steps_of_episode)
    again = end_at(rollouts.dones[1:] & rollouts.terminated[:, None], rollouts.mask)
    assert all(
        torch.equal(a, b) for a, b in zip(again, (rollouts.dones, rollouts.mask, rollouts.terminated), strict=True)
    )


def test_no_gradient_comes_from_what_is_masked() -> None:
    x = torch.tensor([1.0, float("nan")], requires_grad=True)
    masked(x, torch.tensor([True, False])).square().sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 0.0]
