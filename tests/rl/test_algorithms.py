"""Laws that every algorithm keeps: masks never leak, nothing is NaN, parts add up, two processes are as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prts_core.config.rl import AlgorithmConfig, LearnerConfig, RlConfig
from prts_core.io.errors import ConfigError
from prts_core.rl.algorithms import NEEDS, Evaluated, Samples, algorithm, names, unread, weighing
from prts_core.rl.algorithms.recap import threshold
from prts_core.rl.means import Totals
from prts_core.rl.metrics import pool
from prts_core.rl.rollouts import Rollouts
from tests.rl.made import evaluated, gradients, in_processes, make, part, samples, spoiled

ALL = ("dagger", "decoupled_ppo", "grpo", "ppo", "recap")
SEEDS = st.integers(0, 10_000)


@st.composite
def configs(draw: st.DrawFn, name: str) -> AlgorithmConfig:
    return AlgorithmConfig(
        name=name,
        reward_level=draw(st.sampled_from(["action", "chunk"])),
        log_prob_level=draw(st.sampled_from(["token", "action", "chunk"])),
        gamma=draw(st.sampled_from([0.0, 0.9, 1.0])),
        gae_lambda=draw(st.sampled_from([0.0, 0.95, 1.0])),
        normalize_advantages=draw(st.booleans()),
        filter_returns=draw(st.sampled_from([None, (-1.0, 1.0)])),
        dual_clip=draw(st.sampled_from([None, 3.0])),
        weight_limit=draw(st.sampled_from([None, 1.2])),
        max_staleness=draw(st.sampled_from([0, 1, 9])),
        entropy_bonus=0.01,
        kl_weight=0.1,
        positive_share=draw(st.floats(0, 1)),
    )


def test_algorithms_are_found_by_listing() -> None:
    assert set(ALL) <= set(names())
    for name in names():
        assert algorithm(name).NEEDS <= NEEDS
    with pytest.raises(ConfigError, match="did you mean 'ppo'"):
        algorithm("ppoo")


def learn(
    rollouts: Rollouts, config: AlgorithmConfig, seed: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    chosen = algorithm(config.name)
    was = samples(rollouts, chosen.targets(rollouts, config))
    now = evaluated(was, seed)
    loss, metrics = chosen.loss(now, was, config)
    loss.backward()
    return loss.detach(), metrics, gradients(now)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=SEEDS)
def test_what_was_not_executed_never_leaks(name: str, data: st.DataObject, seed: int) -> None:
    """NaN in its place: the same loss, metrics and gradients, all finite, and none of them for what does not count."""
    config = data.draw(configs(name))
    rollouts = make(seed)
    loss, metrics, grads = learn(rollouts, config, seed)
    for filling in (float("nan"), float("inf"), 3.0):
        again, others, more = learn(spoiled(rollouts, filling), config, seed)
        assert torch.equal(loss, again)
        for key, value in metrics.items():
            assert torch.equal(value.nan_to_num(-7), others[key].nan_to_num(-7)), key
            assert value.isfinite() or key == "critic/explained_variance", key
            assert value.ndim == 0 and not value.requires_grad
        for key, grad in grads.items():
            assert torch.equal(grad, more[key]) and grad.isfinite().all(), key
    left_out = ~rollouts.mask.flatten(0, 1)
    assert (grads["log_probs"][left_out] == 0).all() and (grads["entropy"][left_out] == 0).all()
    assert (grads["imitation"][left_out.all(1)] == 0).all()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=SEEDS)
def test_no_mask_makes_anything_nan(name: str, data: st.DataObject, seed: int) -> None:
    """One decision, or none, in all episodes."""
    config = data.draw(configs(name))
    rollouts = make(seed)
    for kept in (0, 1):
        mask = torch.zeros_like(rollouts.mask)
        mask[0, :kept, 0] = True
        few = replace(rollouts, mask=mask)
        chosen = algorithm(name)
        targets = chosen.targets(few, config)
        assert targets.advantages.isfinite().all()
        if kept == 0:
            assert not targets.informative
        loss, metrics, grads = learn(few, config, seed)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
        assert all(value.isfinite() for key, value in metrics.items() if key != "critic/explained_variance")
        if kept == 0:
            assert loss == 0 and all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=SEEDS, groups=st.integers(0, 2))
def test_two_processes_are_as_one(name: str, data: st.DataObject, seed: int, groups: int) -> None:
    config = data.draw(configs(name))
    rollouts, chosen = make(seed), algorithm(name)
    whole = chosen.targets(rollouts, config)
    halves = [part(rollouts, slice(0, 3 * groups)), part(rollouts, slice(3 * groups, None))]
    got = in_processes([lambda reduce, h=h: chosen.targets(h, config, reduce) for h in halves])
    for field in ("advantages", "returns", "mask", "steps_of_episode", "good"):
        one = getattr(whole, field)
        if one is not None:
            torch.testing.assert_close(torch.cat([getattr(x, field) for x in got], 1), one, atol=1e-5, rtol=1e-5)
    for half in got:
        assert half.informative == whole.informative
        assert half.metrics == pytest.approx(whole.metrics, nan_ok=True)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=SEEDS, cut=st.integers(1, 23))
def test_micro_batches_add_up(name: str, data: st.DataObject, seed: int, cut: int) -> None:
    """Gradients, loss and metrics of an update do not depend on how it is cut. A weight limit's denominator does."""
    config = replace(data.draw(configs(name)), weight_limit=None, max_staleness=9)
    rollouts, chosen = make(seed), algorithm(name)
    was = samples(rollouts, chosen.targets(rollouts, config))
    now = evaluated(was, seed)
    loss, metrics = chosen.loss(now, was, config)
    loss.backward()
    wanted = gradients(now)
    again = evaluated(was, seed)
    parts = [(rows_of(again, rows), rows_of(was, rows)) for rows in (slice(0, cut), slice(cut, None))]
    totals = Totals(*(sum(pair) for pair in zip(*(weighing(s) for _, s in parts), strict=True)))
    shares = []
    for given_, one in parts:
        share, numbers = chosen.loss(given_, replace(one, totals=totals), config)
        share.backward()
        shares.append((share.detach(), numbers))
    torch.testing.assert_close(shares[0][0] + shares[1][0], loss.detach(), atol=1e-5, rtol=1e-4)
    for key, grad in gradients(again).items():
        torch.testing.assert_close(grad, wanted[key], atol=1e-6, rtol=1e-4)
    pooled = pool([numbers for _, numbers in shares])
    assert pooled == pytest.approx(pool([metrics]), rel=1e-3, abs=1e-4, nan_ok=True)
    assert not any("/sum_" in key for key in pooled)


def rows_of(x: Samples | Evaluated, rows: slice):
    return replace(x, **{k: v[rows] for k, v in vars(x).items() if isinstance(v, Tensor)})


def test_settings_that_an_algorithm_does_not_read_are_named() -> None:
    def idle(name: str, **changes) -> list[str]:
        made = AlgorithmConfig(name=name, group_size=8, **changes)
        return unread(RlConfig(dataset="toy", algorithm=made, learner=LearnerConfig(target_kl=0.1, critic_epochs=3)))

    assert idle("ppo", gamma=0.9, replay=2, filter_returns=(0.1, 0.9)) == ["algorithm.filter_returns"]
    assert idle("grpo", gamma=0.9, replay=2) == ["algorithm.gamma", "algorithm.replay", "learner.critic_epochs"]
    assert idle("dagger", replay=2, clip_low=0.1) == [
        "algorithm.clip_low",
        "learner.critic_epochs",
        "learner.target_kl",
    ]
    assert idle("recap", positive_share=0.5, weight_limit=2.0)[0] == "algorithm.weight_limit"
    for name in ALL:  # every setting is somebody's
        assert not any(unread(RlConfig(dataset="toy", algorithm=AlgorithmConfig(name=name, group_size=8))))


@pytest.mark.parametrize("level", ["action", "chunk"])
def test_every_episode_weighs_alike(level) -> None:
    """Twice as long is not twice as loud."""
    rollouts = make(3)
    config = AlgorithmConfig(reward_level=level, log_prob_level="chunk", entropy_bonus=0, kl_weight=0)
    was = samples(rollouts, algorithm("ppo").targets(rollouts, config))
    weight = was.mean.weights.reshape(4, 6, -1).sum((0, 2))
    torch.testing.assert_close(weight, torch.full((6,), float(was.most_steps)))


def test_grpo_of_groups_without_information_takes_no_step() -> None:
    rollouts = make(1)
    alike = replace(rollouts, earned=torch.zeros_like(rollouts.earned))
    config = AlgorithmConfig(name="grpo")
    targets = algorithm("grpo").targets(alike, config)
    assert not targets.informative and not targets.mask.any()
    assert targets.metrics == {"rollout/informative_episodes": 0.0}
    was = samples(alike, targets)
    now = evaluated(was, 0)
    loss, metrics = algorithm("grpo").loss(now, was, config)
    loss.backward()
    assert loss == 0 and metrics["actor/no_information"] == 1 and pool([metrics, metrics])["actor/no_information"] == 1
    assert not gradients(now)["log_probs"].any()


def test_grpo_leaves_out_groups_beyond_the_limits_and_keeps_the_others_loud() -> None:
    rollouts = make(1)
    earned = torch.zeros_like(rollouts.earned)
    earned[0, :, 0] = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])  # group means 2/3 and 1/3
    rollouts = replace(rollouts, earned=earned)
    config = AlgorithmConfig(name="grpo", filter_returns=(0.1, 0.5))
    targets = algorithm("grpo").targets(rollouts, config)
    assert not targets.mask[:, :3].any() and targets.mask[0, 3:].all()
    assert targets.advantages[0, :, 0].sign().tolist() == [0, 0, 0, -1, -1, 1]
    alone = part(rollouts, slice(3, None))
    a, b = (learn(x, config, 0)[1] for x in (rollouts, alone))
    assert a["actor/no_information"] == 0
    half = algorithm("grpo").targets(alone, config)
    torch.testing.assert_close(half.advantages, targets.advantages[:, 3:])
    assert b["actor/no_information"] == 0


def test_decoupled_ppo_on_policy_is_ppo() -> None:
    rollouts = make(5)
    rollouts = replace(rollouts, version=torch.full_like(rollouts.version, 2))
    config = AlgorithmConfig(log_prob_level="action", dual_clip=3.0)
    a, b = (learn(rollouts, replace(config, name=name), 1) for name in ("ppo", "decoupled_ppo"))
    torch.testing.assert_close(a[0], b[0])
    for key, grad in a[2].items():
        torch.testing.assert_close(grad, b[2][key])


def test_decoupled_ppo_drops_what_is_too_stale() -> None:
    rollouts = make(5)
    config = AlgorithmConfig(name="decoupled_ppo", max_staleness=1)
    _, metrics, grads = learn(rollouts, config, 1)
    stale = (rollouts.version < 1).flatten(0, 1)
    assert not grads["log_probs"][stale].any() and grads["log_probs"][~stale].any()
    assert 1 <= metrics["actor/average_version"] <= 2 and metrics["actor/current_version"] == 3


def test_the_actor_rests_while_the_critic_warms_up() -> None:
    rollouts = make(2)
    config = AlgorithmConfig(entropy_bonus=0.1, kl_weight=0.1)
    was = replace(samples(rollouts, algorithm("ppo").targets(rollouts, config)), critic_only=True)
    now = evaluated(was, 0)
    algorithm("ppo").loss(now, was, config)[0].backward()
    grads = gradients(now)
    assert not grads["log_probs"].any() and not grads["entropy"].any() and grads["values"].any()


def test_the_divergence_from_the_start_is_really_in_the_loss() -> None:
    rollouts = make(2)
    off = AlgorithmConfig(kl_weight=0.0)
    a, b = (learn(rollouts, config, 4) for config in (off, replace(off, kl_weight=2.0)))
    assert float(b[0] - a[0]) == pytest.approx(2 * float(a[1]["actor/kl_to_reference"]), rel=1e-4)
    assert float(a[1]["actor/kl_to_reference"]) > 0


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0, 1), st.integers(1, 24))
def test_recap_calls_the_best_share_good(seed: int, share: float, counted: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 1, generator=random)
    mask = (torch.randperm(24, generator=random) < counted)[:, None]
    good = mask & (x.double() > threshold(x, mask, share))
    assert int(good.sum()) == int(share * counted + 1e-6)
    assert not good.any() or x[good].min() > x[mask & ~good].max() if (mask & ~good).any() else True


def test_recap_calls_nothing_good_where_all_are_alike() -> None:
    x = torch.full((9, 1), 0.1)
    assert not (x.double() > threshold(x, torch.ones_like(x, dtype=torch.bool), 0.5)).any()


def test_recap_measures_against_reachability_and_what_was_earned() -> None:
    rollouts = replace(make(7), values=None)
    config = AlgorithmConfig(name="recap", gae_lambda=1.0, gamma=1.0, positive_share=0.5)
    targets = algorithm("recap").targets(rollouts, config)
    assert rollouts.reachability is not None and targets.returns is not None and targets.good is not None
    decided = rollouts.mask.any(-1)
    first = targets.returns[0, :, 0] - rollouts.returns
    final = torch.stack(
        [rollouts.reachability[int(decided[:, b].sum()), b, 0] * ~rollouts.terminated[b] for b in range(6)]
    )
    torch.testing.assert_close(first, final)
    unsure = algorithm("recap").targets(rollouts, replace(config, bootstrap=False))
    assert unsure.returns is not None
    torch.testing.assert_close(unsure.returns[0, :, 0], rollouts.returns)
    assert 0 < targets.good.sum() <= decided.sum() / 2 and not targets.good[~decided].any()
    was = samples(rollouts, targets)
    loss, metrics = algorithm("recap").loss(evaluated(was, 0), was, config)
    assert metrics["actor/good"] == pytest.approx(targets.metrics["rollout/good"])
    imitation = evaluated(was, 0).imitation
    assert imitation is not None
    torch.testing.assert_close(loss.detach(), imitation.detach()[decided.flatten()].mean())
