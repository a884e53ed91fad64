"""Readers of the golden cases of losses, and what each of the reference's defects does to its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prts_core.config.rl import AlgorithmConfig
from prts_core.rl.algorithms import Evaluated, Samples, algorithm
from prts_core.rl.losses import (
    LOG_RATIO_LIMITS,
    Clip,
    at_level,
    decoupled_policy_loss,
    divergence,
    explained_sums,
    explained_variance,
    huber,
    policy_loss,
    proximal_log_probs,
    value_loss,
)
from prts_core.rl.means import Mean, Totals
from prts_core.rl.metrics import pool
from tests.rl.golden_rl import LEVELS, Case, chunks

RATIOS = ("ratio", "ratio_abs", "clipped_ratio")
DECOUPLED = ("proximal_ratio", "clipped_proximal_ratio", "proximal_approx_kl")


def read_ppo_actor(case: Case) -> None:
    if "agg" in case.name:
        return _aggregated(case)
    level = LEVELS[case.facts["logprob_type"]]
    now = case["logprobs"].clone().requires_grad_()
    limits = tuple(
        case.facts.get(f"clip_log_ratio_{end}", at) for end, at in zip(("min", "max"), LOG_RATIO_LIMITS, strict=True)
    )
    mean = _mean(case, case["advantages"])
    loss, metrics = policy_loss(
        chunks(now), chunks(case["old_logprobs"]), case["advantages"], mean, level, _clip(case), limits
    )
    if case.facts.get("critic_warmup"):
        loss = 0 * loss
        metrics["actor/policy_loss"] = loss.detach()
    inflated = _repeats(case, level)
    of_loss = inflated if "loss_mask_sum" not in case.inputs else 1.0
    loss.backward()
    case.meet(loss, "loss", 1 / of_loss)
    case.meet(now.grad, "grad_logprobs", 1 / of_loss)
    for name in RATIOS:  # right where the mask is spread over numbers of actions, not where over actions
        case.meet(metrics[f"actor/{name}"], f"metric.actor/{name}", 1 / (inflated if level == "action" else 1))
    for name in ("approx_kl", "clip_fraction"):  # defect 2
        case.meet(metrics[f"actor/{name}"], f"metric.actor/{name}", 1 / inflated)


def _repeats(case: Case, level: str) -> float:
    """Defect 2: means divide by what counts before it is spread over the ratio's entries."""
    if "loss_mask" not in case.inputs or level == "chunk":
        return 1.0
    ratios = chunks(case["logprobs"]).shape[1] * (7 if level == "token" else 1)
    return ratios / case["loss_mask"].shape[1]


def _mean(case: Case, like: Tensor) -> Mean:
    """Three reductions: a plain mean; over a mask; over everything, each entry by the length of its episode."""
    mask = case.inputs.get("loss_mask", torch.ones_like(like, dtype=torch.bool))
    if "loss_mask_sum" not in case.inputs:
        return Mean.over(mask)
    weights = mask / (case["loss_mask_sum"] / case.facts["max_episode_steps"]).to(like.dtype)  # rounded to float32
    return Mean(mask, weights, totals=Totals(mask.numel(), mask.sum()))


def _clip(case: Case) -> Clip:
    return Clip(case.facts["clip_ratio_low"], case.facts["clip_ratio_high"], case.facts.get("clip_ratio_c"))


def _aggregated(case: Case) -> None:
    """Rows are episodes: a mean over all entries, a mean of their means, a mean of their sums."""
    mask, rows = case["loss_mask"], len(case["loss_mask"])
    mean = {
        "token-mean": Mean.over(mask),
        "seq-mean-token-mean": Mean.over(mask, mask.sum(1)),
        "seq-mean-token-sum": Mean.over(mask, totals=Totals(rows, mask.sum())),
    }[case.facts["loss_agg"]]
    now = case["logprobs"].clone().requires_grad_()
    pair = now[..., None], case["old_logprobs"][..., None]
    loss, metrics = policy_loss(*pair, case["advantages"], mean, "token", _clip(case))
    loss.backward()
    case.meet(loss, "loss")
    case.meet(now.grad, "grad_logprobs")
    for name in (*RATIOS, "approx_kl", "clip_fraction"):
        case.meet(metrics[f"actor/{name}"], f"metric.actor/{name}")


def read_actor_critic(case: Case) -> None:
    """Both losses, weight 1."""
    level = LEVELS[case.facts["logprob_type"]]
    now, values = (case[name].clone().requires_grad_() for name in ("logprobs", "values"))
    pair = chunks(now), chunks(case["old_logprobs"])
    mean = _mean(case, case["advantages"])
    actor, metrics = policy_loss(*pair, case["advantages"], mean, level, _clip(case))
    critic, more = _critic(case, values, mean)
    loss = critic + (0.0 if case.facts["critic_warmup"] else 1.0) * actor
    loss.backward()
    case.meet(loss, "loss")
    case.meet(now.grad, "grad_logprobs")
    case.meet(values.grad, "grad_values")
    for name in RATIOS:
        case.meet(metrics[f"actor/{name}"], f"metric.actor/{name}")
    _meet_critic(case, more, "metric.")


def _critic(case: Case, values: Tensor, mean: Mean) -> tuple[Tensor, dict[str, Tensor]]:
    return value_loss(
        values, case["prev_values"], case["returns"], mean, case.facts["value_clip"], case.facts["huber_delta"]
    )


def _meet_critic(case: Case, metrics: dict[str, Tensor], prefix: str) -> None:
    case.meet(metrics["critic/value_loss"], f"{prefix}critic/value_loss")
    names = ("count", "returns_sum", "returns_sq_sum", "errors_sum", "errors_sq_sum")
    for ours, theirs in zip(("count", "returns", "returns_squared", "errors", "errors_squared"), names, strict=True):
        case.meet(metrics[f"critic/sum_{ours}"], f"{prefix}ev_stat.{theirs}", atol=1e-5, rtol=1e-5)


def read_critic(case: Case) -> None:
    if case.name.endswith("clip_ratio_rounding"):
        columns = [case[name][:, None] for name in ("values", "prev_values", "returns")]
        mean = Mean.over(torch.ones_like(columns[0], dtype=torch.bool))
        _, metrics = value_loss(*columns, mean, case.facts["value_clip"], case.facts["huber_delta"])
        case.meet(metrics["critic/value_clip_ratio"], "share_moved_more_than_clip")  # defect 1: rounding noise
        return
    values = case["values"].clone().requires_grad_()
    loss, metrics = _critic(case, values, _mean(case, values))
    loss.backward()
    case.meet(loss, "loss", **_tight(values))
    case.meet(values.grad, "grad_values", **_tight(values))
    _meet_critic(case, metrics, "metric.")
    case.meet(metrics["critic/explained_variance"], "explained_variance")
    if "loss_mask" not in case.inputs:
        case.meet(metrics["critic/value_clip_ratio"], "share_moved_more_than_clip")


def _tight(x: Tensor) -> dict[str, float]:
    return {"atol": 1e-10, "rtol": 1e-10} if x.dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-5}


def read_explained_variance(case: Case) -> None:
    parts = [f"part.{n}." for n in range(case.facts.get("parts", 0))] or [""]
    everything = torch.ones((), dtype=torch.bool)
    sums = sum(
        explained_sums(case[f"{at}values"], case[f"{at}returns"], case.inputs.get(f"{at}loss_mask", everything))
        for at in parts
    )
    case.meet(explained_variance(sums), "explained_variance", atol=1e-5, rtol=1e-5)


def read_decoupled(case: Case) -> None:
    level = LEVELS[case.facts["logprob_type"]]
    now, values = (case[name].clone().requires_grad_() for name in ("logprobs", "values"))
    old = case["old_logprobs"]
    if "proximal_logprobs" in case.inputs:
        proximal = case["proximal_logprobs"]
    elif "versions" in case.inputs:
        proximal = proximal_log_probs(now, old, case["versions"], case.facts["current_version"])
    else:
        proximal = old
    mean = _mean(case, case["advantages"])
    triple = chunks(now), chunks(old), chunks(proximal)
    limit = case.facts.get("behave_weight_threshold")
    actor, metrics = decoupled_policy_loss(*triple, case["advantages"], mean, level, _clip(case), limit)
    critic, more = _critic(case, values, mean)
    inflated = _repeats(case, level)
    (actor + critic).backward()
    case.meet(values.grad, "grad_values")
    _meet_critic(case, more, "metric.")
    loss = case.outputs["metric.actor/policy_loss"] / _of_loss(case, inflated)
    torch.testing.assert_close(actor.detach().double(), loss.double(), atol=1e-6, rtol=1e-5)
    case.meet(now.grad, "grad_logprobs", 1 / _of_loss(case, inflated))
    for name in (*DECOUPLED, "clip_fraction", *(["behav_approx_kl"] if limit is None else [])):  # theirs: of the kept
        case.meet(metrics[f"actor/{name}"], f"metric.actor/{name}", 1 / inflated)


def _of_loss(case: Case, inflated: float) -> float:
    """A limit of the weight spreads the mask, which mends the denominator."""
    return 1.0 if "loss_mask_sum" in case.inputs or "behave_weight_threshold" in case.facts else inflated


def read_micro_batch(case: Case) -> None:
    """Through the algorithms themselves. Defect 10: their total_loss and gradients are those of the whole, divided."""
    facts, parts = case.facts, case.facts["gradient_accumulation"]
    level = LEVELS[facts["logprob_type"]]
    now, entropy, values = (case[name].clone().requires_grad_() for name in ("logprobs", "entropy", "values"))
    warmup = facts["optimizer_steps"] < facts["critic_warmup_steps"]
    config = AlgorithmConfig(
        log_prob_level=level,
        clip_low=facts["clip_ratio_low"],
        clip_high=facts["clip_ratio_high"],
        value_clip=facts["value_clip"],
        huber_delta=facts["huber_delta"],
        entropy_bonus=facts["entropy_bonus"],
    )
    critic = facts["adv_type"] == "gae"
    rows, mask = len(now), torch.ones_like(case["advantages"], dtype=torch.bool)
    samples = Samples(
        chunks(case["old_logprobs"]),
        case["advantages"],
        case["returns"] if critic else None,
        case["prev_values"] if critic else None,
        mask,
        torch.full((rows,), mask.shape[1]),
        mask.shape[1],
        torch.zeros(rows, dtype=torch.int64),
        1,
        critic_only=warmup,
    )
    fine = entropy if entropy.shape[1] == 1 else chunks(entropy)
    if facts["entropy_type"] == "action_level":
        fine = at_level(fine, "action")
    given = Evaluated(chunks(now), fine, values if critic else None)
    loss, metrics = algorithm("ppo" if critic else "grpo").loss(given, samples, config)
    loss.backward()
    case.meet(loss, "metric.actor/total_loss", parts)
    for name, x in (("logprobs", now), ("entropy", entropy), ("values", values)):
        case.meet(torch.zeros_like(x) if x.grad is None else x.grad, f"grad_{name}", parts)
    if facts["entropy_bonus"] and not warmup:  # they log 0 where it has no weight
        case.meet(metrics["actor/entropy_loss"], "metric.actor/entropy_loss")
    for name in RATIOS:
        case.meet(metrics[f"actor/{name}"], f"metric.actor/{name}")
    if critic:
        _meet_critic(case, metrics, "metric.")
    _shares_add_up(given, samples, config, metrics, "ppo" if critic else "grpo")


def _shares_add_up(now: Evaluated, was: Samples, config: AlgorithmConfig, whole: dict, name: str) -> None:
    """Two micro-batches of unequal size come to the numbers of the one."""
    mean, parts = was.mean, []
    totals = Totals(mean.weights.sum(), mean.mask.sum())
    for rows in (slice(0, 3), slice(3, None)):
        part = {k: v[rows] for k, v in vars(was).items() if isinstance(v, Tensor)}
        given = Evaluated(**{k: None if v is None else v.detach()[rows] for k, v in vars(now).items()})
        parts.append(algorithm(name).loss(given, replace(was, **part, totals=totals), config)[1])
    alone = pool([whole])
    for key, value in pool(parts).items():
        assert value == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key


def read_kl(case: Case) -> None:
    """k3, to where the reference cuts it off at 10: there its gradient is 0, and ours still leads back."""
    now = case["logprob"].clone().requires_grad_()
    got = divergence(now, case["ref_logprob"])
    got.sum().backward()
    near = (case["ref_logprob"] - case["logprob"] < 2.6) & (case.outputs["low_var_kl"] < 10)
    assert near.sum() >= near.numel() - 4
    for ours, name in ((got, "low_var_kl"), (now.grad, "grad_sum_low_var_kl")):
        case.outputs[name] = torch.where(near, case.outputs[name], 0)
        case.meet(torch.where(near, ours, 0), name)
    assert (now.grad[~near].abs() > 0.9).all() and (got[~near] > 10 - 1e-4).all()


def read_huber(case: Case) -> None:
    for name in case.outputs:
        case.meet(huber(case["error"], float(name[1:])), name)


def read_entropy(case: Case) -> None:
    fine = chunks(case["entropy"], case.facts["action_dim"])
    for level in ("token", "action", "chunk"):
        case.meet(at_level(fine, level), level)
    case.meet(Mean.over(case["mask"]).loss(at_level(fine, "action")), "masked_mean_action")


def read_masked_mean(case: Case) -> None:
    x, wide, narrow = case["x"].flatten(0, 1), *(case[f"mask_{n}"].flatten(0, 1) for n in ("full", "broadcast"))
    everything = torch.ones_like(wide)
    case.meet(Mean.over(wide).loss(x), "full")
    case.meet(Mean.over(everything).loss(x), "none")
    case.meet(Mean.over(~everything).loss(x), "all_false")
    case.meet(Mean.over(narrow).loss(x), "broadcast", 1 / x.shape[1])  # defect 2
    weights = narrow / case["ratio"].flatten(0, 1)
    case.meet(Mean(narrow, weights, totals=Totals(narrow.numel(), 1)).loss(x), "ratio")


def read_nft(case: Case) -> None:
    pytest.skip("negative-aware fine-tuning of flow policies is no algorithm here")
