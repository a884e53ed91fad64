"""What a log says of an iteration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.algorithms import algorithm
from prts_core.rl.metrics import episode_metrics, highest, mean_of, pool, rollout_metrics, staleness_metrics
from tests.rl.made import in_processes, make, part, spoiled


def test_episodes() -> None:
    rollouts = make(0, decisions=2, episodes=2, steps=2)
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [0, 0]]]).bool()
    earned = torch.tensor([[[0.0, 0.0], [3.0, 99.0]], [[6.0, 99.0], [99.0, 99.0]]])
    rollouts = replace(rollouts, mask=mask, earned=earned, terminated=torch.tensor([False, True]))
    assert episode_metrics(rollouts) == {
        "env/success_once": 0.5,
        "env/return": 4.5,
        "env/episode_len": 2.0,
        "env/reward": 2.5,
    }


@pytest.mark.parametrize("cut", [0, 3, 6])
def test_two_processes_log_what_one_would(cut: int) -> None:
    rollouts, ppo, config = (
        spoiled(make(3), float("nan")),
        algorithm("ppo"),
        AlgorithmConfig(normalize_advantages=False),
    )

    def numbers(some, reduce=None, reduce_max=None):
        logged = rollout_metrics(some, ppo.targets(some, config, reduce), reduce, reduce_max)
        return logged | episode_metrics(some, reduce) | staleness_metrics(some, 3, 2, reduce)

    whole = numbers(rollouts)
    halves = [part(rollouts, slice(0, cut)), part(rollouts, slice(cut, None))]
    got = in_processes([lambda reduce, h=h: numbers(h, reduce, lambda own: reduce(own, largest=True)) for h in halves])
    assert all(numbers_ == pytest.approx(whole) for numbers_ in got)
    assert all(value == value for value in whole.values())
    assert {"rollout/rewards", "rollout/advantages_min", "rollout/returns_max", "env/return"} <= set(whole)
    assert sum(value for key, value in whole.items() if "staleness" in key) == pytest.approx(1)


def test_nothing_to_count_is_nan() -> None:
    x, none = torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.bool)
    assert mean_of(x, none) != mean_of(x, none) and highest(x, none) != highest(x, none)


def test_a_pool_makes_the_explained_variance_anew() -> None:
    parts = []
    for returns, errors in (([0.0, 1.0], [0.5, 0.5]), ([2.0, 3.0], [0.5, 0.5])):
        r, e = torch.tensor(returns), torch.tensor(errors)
        sums = (torch.tensor(2.0), r.sum(), r.square().sum(), e.sum(), e.square().sum())
        names = ("count", "returns", "returns_squared", "errors", "errors_squared")
        parts.append({f"critic/sum_{name}": x for name, x in zip(names, sums, strict=True)} | {"actor/loss": r[0]})
    assert pool(parts) == {"actor/loss": 2.0, "critic/explained_variance": 1.0}
