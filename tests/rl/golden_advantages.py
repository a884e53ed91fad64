"""Readers of the golden cases of advantages, masks, rewards and the log's numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.advantages import advantages_of_decisions, gae, group_relative, normalise
from prts_core.rl.algorithms import Targets, grpo
from prts_core.rl.metrics import mean_of, rollout_metrics
from prts_core.rl.rollouts import entries_of_episode
from tests.rl.golden_rl import Case, rollouts

GROUPED = {"atol": 1e-4, "rtol": 1e-4}  # deviations of nearly equal scores


def read_gae(case: Case) -> None:
    if "flat" in case.name:
        return _flat(case)
    if "bootstrap" in case.name:
        return _bootstrapped(case)
    dones, level = case["dones"], case.facts["reward_type"]
    rewards, values, ended, shape = _time(case["rewards"], case["values"], dones, level)
    got = _normalised(case, *gae(rewards, values[:-1], values[1:] * ~ended, ~ended, *_discounts(case)))
    for x, name in zip(got, ("advantages", "returns"), strict=True):
        x = x.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
        mask = case.inputs.get("loss_mask", torch.ones_like(x, dtype=torch.bool))
        _meet_where(case, x, name, mask)
    if level == "chunk_level":
        _without_rewards_after_the_end(case)


def _without_rewards_after_the_end(case: Case) -> None:
    """Defect 7: a chunk's reward sums what came after the end too. Where nothing comes after it, we agree; else our
    last decision has only what the episode earned."""
    ours = rollouts(case["rewards"], case["dones"], case["values"])
    advantages, _ = advantages_of_decisions(ours, case["values"], *_discounts(case), "chunk")
    rewards, values, ended, _ = _time(case["rewards"], case["values"], case["dones"], "chunk_level")
    theirs, _ = gae(rewards, values[:-1], values[1:] * ~ended, ~ended, *_discounts(case))
    after = (case["rewards"] * ~ours.mask)[:, :, :].abs().sum(-1) * ours.mask.any(-1)
    clean = (after == 0).all(0)
    decided = ours.mask.any(-1)
    same = decided & clean
    torch.testing.assert_close(advantages[..., 0][same], theirs[same], atol=1e-5, rtol=1e-5)
    for column in (~clean).nonzero().flatten().tolist():
        last = int(decided[:, column].sum()) - 1
        earned = case["rewards"][last, column][ours.mask[last, column]].sum()
        torch.testing.assert_close(advantages[last, column, 0], earned - case["values"][last, column, 0])


def _flat(case: Case) -> None:
    dones, rewards = case["dones"], case["rewards"]
    values, discounts = case.inputs.get("values"), _discounts(case)
    if values is None:  # without a critic: the reward to go
        values, discounts = torch.zeros_like(dones, dtype=rewards.dtype), (1.0, 1.0)
    got = gae(rewards, values[:-1], values[1:] * ~dones[1:], ~dones[1:], *discounts)
    mask = case.inputs.get("loss_mask", torch.ones_like(rewards, dtype=torch.bool))
    advantages, returns = _normalised(case, *got)
    if mask.sum() == 1:  # defect 8: a deviation of one value is NaN; ours is 0
        assert case.facts["nan_outputs"] and (advantages == 0).all()
        return
    _meet_where(case, advantages, "advantages", mask)
    if case.facts.get("normalize_returns"):
        returns = normalise(returns, mask)
    _meet_where(case, returns, "returns", mask)


def _bootstrapped(case: Case) -> None:
    """A cut episode goes on in the value of its final observation, which is what the reference adds to the reward."""
    ended = case["terminations"][1:, :, -1] | case["truncations"][1:, :, -1]
    over = (case["terminations"] | case["truncations"])[1:].any(-1)
    cut = {
        "standard": case["truncations"][1:, :, -1],
        "always": ended,
    }[case.facts["bootstrap_type"]] & torch.tensor(case.facts["auto_reset"])
    values, rewards = case["values"][..., 0], case["rewards"].sum(-1)
    final = case["bootstrap_values"][..., 0]
    following = torch.where(cut, final, values[1:] * ~over)
    advantages, returns = gae(rewards, values[:-1], following, ~over, *_discounts(case))
    case.meet(normalise(advantages, torch.ones_like(ended)), "advantages")
    case.meet(returns, "returns")
    both = cut & case["terminations"][1:].any(-1)
    if case.facts["bootstrap_type"] == "standard" and both.any():  # defect 9: a solved episode has no rest
        right = torch.where(cut & ~both, final, values[1:] * ~over)
        fixed, _ = gae(rewards, values[:-1], right, ~over, *_discounts(case))
        torch.testing.assert_close((advantages - fixed)[both], case.facts["gamma"] * final[both], atol=1e-6, rtol=1e-5)


def _time(rewards: Tensor, values: Tensor, dones: Tensor, level: str) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(rewards (T, B), values (T+1, B), ended (T, B), shape) in order of time, as the reference lines them up."""
    if level == "chunk_level":
        rewards, dones = rewards.sum(-1, keepdim=True), dones.any(-1, keepdim=True)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (rewards, values, dones)]
    steps = len(flat[0])
    return flat[0], flat[1][: steps + 1], flat[2][-steps:], tuple(rewards.shape)


def _discounts(case: Case) -> tuple[float, float]:
    """Their product has the precision of float32 in the reference, whatever the rest has."""
    gamma, trace = case.facts["gamma"], torch.tensor(case.facts["gamma"] * case.facts["gae_lambda"]).item()
    return gamma, trace / gamma


def _normalised(case: Case, advantages: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    if not case.facts.get("normalize_advantages"):
        return advantages, returns
    mask = case.inputs.get("loss_mask")
    if mask is None:
        mask = torch.ones_like(advantages, dtype=torch.bool)
    elif mask.ndim == 3:
        mask = mask.transpose(1, 2).flatten(0, 1)
    return normalise(advantages, mask), returns


def _meet_where(case: Case, got: Tensor, name: str, mask: Tensor) -> None:
    """Where it counts; elsewhere the reference leaves normalised numbers (quirk 16), ours are 0."""
    wanted = torch.where(mask, case.outputs[name], 0).double()
    tight = {"atol": 1e-9, "rtol": 1e-9} if got.dtype == torch.float64 else {"atol": 2e-6, "rtol": 1e-5}
    torch.testing.assert_close(torch.where(mask, got, 0).double(), wanted, **tight)


def read_grpo(case: Case) -> None:
    if "video" in case.name:
        pytest.skip("advantages entry by entry are for generated videos; no algorithm here has them")
    size, rewards, dones = case.facts["group_size"], case["rewards"], case["dones"]
    if case.name.endswith("success_lost_inside_chunk"):
        ours = rollouts(rewards, dones, group_size=size)
        advantages, _ = group_relative(ours.returns, ours.group)
        case.meet(advantages[:, None] * case["loss_mask"], "action_level", **GROUPED)
        assert advantages[0] > 0 >= case.outputs["chunk_level"][0, 0, 0]  # defect 7: theirs scores that success 0
        return
    if case.facts["reward_type"] == "chunk_level":  # as the reference sums them (defect 7)
        rewards, dones = rewards.sum(-1, keepdim=True), dones.any(-1, keepdim=True)
    ours = rollouts(rewards, dones, group_size=size)
    advantages, informative = group_relative(ours.returns, ours.group)
    if size == 1:  # defect 8
        assert case.facts["nan_outputs"] and (advantages == 0).all() and not informative.any()
        return
    case.meet(advantages[:, None] * case["loss_mask"], "advantages", **GROUPED)


def read_loss_mask(case: Case) -> None:
    for suffix in ("", "_sticky"):
        if f"dones{suffix}" not in case.inputs:
            continue
        dones = case[f"dones{suffix}"]
        executed = torch.ones_like(dones[1:]) & ~dones[0, :, -1][:, None]  # over before the first step
        ours = rollouts(torch.zeros(dones[1:].shape), dones, executed=executed)
        case.meet(ours.mask, f"loss_mask{suffix}")
        case.meet(ours.steps_of_episode[:, None].expand_as(ours.mask), f"loss_mask_sum{suffix}")
        if not suffix and "loss_mask_chunk_level" in case.outputs:
            case.meet(ours.loss_mask("chunk"), "loss_mask_chunk_level")
            steps = ours.steps_of_episode[:, None].expand(ours.loss_mask("chunk").shape)
            case.meet(steps, "loss_mask_sum_chunk_level")


def read_batch(case: Case) -> None:
    """Columns are episodes, epoch after epoch; a minibatch takes decisions in time-major order."""
    epochs, facts = case.facts["rollout_epoch"], case.facts
    folded = {}
    for name in ("rewards", "dones", "prev_values", "prev_logprobs"):
        parts = case[name].reshape(epochs, -1, *case[name].shape[1:])
        folded[name] = torch.cat(list(parts), 1)
        case.meet(folded[name], f"folded.{name}")
    for name in ("rewards", "dones", "prev_values"):
        decisions = folded[name][: len(folded["rewards"])].flatten(0, 1)
        case.meet(decisions[case["shuffle_id"]], f"train.{name}")
    seeded = torch.Generator().manual_seed(facts["shuffle_seed"])
    assert case["shuffle_id"].equal(torch.randperm(len(case["shuffle_id"]), generator=seeded))
    one_episode = not facts["auto_reset"] and not facts["ignore_terminations"]
    dones = folded["dones"] if one_episode else torch.zeros_like(folded["dones"])
    level = "action" if facts["reward_type"] == "action_level" else "chunk"
    ours = rollouts(folded["rewards"], dones, group_size=facts["group_size"])
    if one_episode:
        sums = ours.steps_of_episode[:, None].expand(ours.loss_mask(level).shape)
        case.meet(sums, "folded.loss_mask_sum")
    limits = (facts["rewards_lower_bound"], facts["rewards_upper_bound"]) if facts["filter_rewards"] else None
    if limits and level == "chunk":  # defect 7: their returns have what came after the end
        ours = replace(ours, earned=folded["rewards"], mask=ours.loss_mask("chunk").expand(ours.mask.shape))
    if limits:
        ours_kept = grpo.targets(ours, AlgorithmConfig(reward_level=level, filter_returns=limits)).mask
        case.meet(ours_kept, "folded.loss_mask")
    elif one_episode:
        case.meet(ours.loss_mask(level), "folded.loss_mask")


def read_async(case: Case) -> None:
    for name, mask in (("masked", case["mask"]), ("unmasked", torch.ones_like(case["mask"]))):
        got = normalise(case["x"], mask, eps=case.facts["eps"], ddof=0)
        _meet_where(case, got, name, mask)


def read_rollout_metrics(case: Case) -> None:
    shape = case["rewards"].shape
    mask = case.inputs.get("loss_mask", torch.ones(shape, dtype=torch.bool))
    if case.name.endswith("all_masked"):
        mask = torch.zeros(shape, dtype=torch.bool)
    advantages = case.inputs.get("advantages", case["rewards"])
    ours = rollouts(case["rewards"], torch.zeros(shape[0] + 1, *shape[1:], dtype=torch.bool))
    ours = replace(ours, mask=mask.expand(shape))
    targets = Targets(advantages, case.inputs.get("returns"), mask, entries_of_episode(mask))
    got = rollout_metrics(ours, targets)
    wanted = {name.removeprefix("metric."): value for name, value in case.outputs.items()}
    assert set(got) == {f"rollout/{name}" for name in wanted}
    for name, value in got.items():
        case.meet(torch.tensor(value), f"metric.{name.removeprefix('rollout/')}", atol=1e-6, rtol=1e-5)


def read_eval_metrics(case: Case) -> None:
    for name in ("episode_len", "return", "success_once"):
        shards = [case[f"shard.{n}.{name}"] for n in range(case.facts["shards"])]
        pooled = _summed(shards)
        case.meet(torch.tensor(pooled), f"metric.{name}", atol=1e-6, rtol=1e-5)
    assert sum(len(shard) for shard in shards) == case.outputs["metric.num_trajectories"]


def _summed(shards: list[Tensor]) -> float:
    """The mean that every process computes of shards of unequal length."""
    sums = sum(torch.stack([x.double().sum(), torch.tensor(len(x)).double()]) for x in shards)
    return mean_of(shards[0], torch.ones(len(shards[0]), dtype=torch.bool), lambda own: sums)


def read_reward(case: Case) -> None:
    pytest.skip("no learned reward model takes part in a reward here")
