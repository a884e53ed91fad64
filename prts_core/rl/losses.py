"""Compute the losses of actor and critic on a minibatch, each with the numbers that a run logs of it.

PPO's clipped ratio: arXiv:1707.06347; dual clip: arXiv:1912.09729; decoupled: arXiv:2110.00641. Axes: N decisions, K
actions of a chunk, A numbers of an action. Where `Mean` has the denominators of a larger update, a loss and its metrics
are shares, which add up over the micro-batches (metrics.py, `pool`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prts_core.config.rl import Level
from prts_core.rl.means import Mean
from prts_core.rl.rollouts import masked

Metrics = dict[str, Tensor]
LOG_RATIO_LIMITS = (-20.0, 20.0)  # exp() stays finite in float32, and so do products with an advantage
STEEPEST = 3.0  # where the estimate of the divergence goes on as its tangent
SUMS = ("count", "returns", "returns_squared", "errors", "errors_squared")


def at_level(x: Tensor, level: Level) -> Tensor:
    """(N, K, A) summed to what one ratio stands for: (N, K, A) "token", (N, K) "action", (N, 1) "chunk"."""
    if level == "token":
        return x
    return x.sum(-1) if level == "action" else x.sum((-2, -1))[:, None]


def log_ratio(
    now: Tensor, was: Tensor, counts: Tensor, level: Level, limits: tuple[float, float] = LOG_RATIO_LIMITS
) -> Tensor:
    """log pi_now - log pi_was of actions (N, K, A) at the level; 0 where `counts` (N, 1 or K) is false.

    Differences are taken in float32 at least, before they are summed: chunks' log-probabilities are large and alike.
    """
    wide = torch.float64 if now.dtype == torch.float64 else torch.float32
    difference = masked(now.to(wide), counts[..., None]) - masked(was.to(wide), counts[..., None])
    return at_level(difference, level).clamp(*limits)


@dataclass(frozen=True)
class Clip:
    """The ratio counts from 1 - low to 1 + high; of a negative advantage at most `dual` times; none: off."""

    low: float
    high: float
    dual: float | None = None

    def __call__(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(1 - self.low, 1 + self.high)


def policy_loss(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mean: Mean,
    level: Level,
    clip: Clip,
    limits: tuple[float, float] = LOG_RATIO_LIMITS,
) -> tuple[Tensor, Metrics]:
    """max(-A rho, -A clip(rho)) of the ratio rho to the policy that acted.

    log_probs, old (N, K, A); advantages (N, 1 or K). actor/approx_kl: mean of -log rho, as usually logged; actor/kl:
    of rho - 1 - log rho, which estimates the same, is never negative and varies less.
    """
    ratios = log_ratio(log_probs, old, mean.counts(), level, limits)
    losses, metrics = _clipped(ratios, advantages, mean, clip)
    loss, ratio = mean.loss(losses), ratios.exp()
    return loss, metrics | {
        "actor/policy_loss": loss.detach(),
        "actor/policy_loss_abs": mean.metric(losses.abs()),
        "actor/ratio": mean.metric(ratio),
        "actor/ratio_abs": mean.metric((ratio - 1).abs()),
        "actor/clipped_ratio": mean.metric(clip(ratio)),
        "actor/approx_kl": mean.metric(-ratios),
        "actor/kl": mean.metric(ratio - 1 - ratios),
    }


def decoupled_policy_loss(
    log_probs: Tensor,
    old: Tensor,
    proximal: Tensor,
    advantages: Tensor,
    mean: Mean,
    level: Level,
    clip: Clip,
    weight_limit: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped loss around a proximal policy, weighted by how much likelier that is than the one that acted.

    proximal (N, K, A): its log-probabilities. Entries whose weight exceeds the limit are left out of the loss, not
    of the metrics. actor/approx_kl and actor/kl are those of the policy that acted to the one that learns.
    """
    counts, proximal = mean.counts(), proximal.detach()
    behaviour = log_ratio(proximal, old, counts, level)
    ratios = log_ratio(log_probs, proximal, counts, level)
    weight, ratio, both = behaviour.exp(), ratios.exp(), ratios + behaviour
    kept = mean if weight_limit is None else mean.keep(weight <= weight_limit)
    losses, metrics = _clipped(ratios, advantages, mean, clip)
    loss = kept.loss(losses * weight)
    return loss, metrics | {
        "actor/policy_loss": loss.detach(),
        "actor/proximal_ratio": mean.metric(ratio),
        "actor/clipped_proximal_ratio": mean.metric(clip(ratio)),
        "actor/proximal_approx_kl": mean.metric(-ratios),
        "actor/behav_approx_kl": mean.metric(-behaviour),
        "actor/behav_clip_fraction": mean.metric((weight > (weight_limit or torch.inf)).float()),
        "actor/approx_kl": mean.metric(-both),
        "actor/kl": mean.metric(both.exp() - 1 - both),
    }


def proximal_log_probs(now: Tensor, old: Tensor, version: Tensor, current: int) -> Tensor:
    """Log-probabilities between the policy that acted and the one that learns, by their versions, without a graph:
    old + (current - 1 - version) / (current - version) (now - old), the weight within 0 and 1.

    now, old (N, K, A); version (N,) or as those. current: the version that the update makes. Where the sample is no
    older than the update's start, or of unknown version (negative): old.
    """
    age = (current - version).to(now.dtype)
    weight = ((age - 1) / age.clamp(min=1)).clamp(0, 1)
    weight = masked(weight, (version >= 0) & (age > 0))
    return old + weight.reshape(*weight.shape, *[1] * (now.ndim - weight.ndim)) * (now.detach() - old)


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mean: Mean, clip: float, delta: float
) -> tuple[Tensor, Metrics]:
    """max(h(R - V), h(R - V_clipped)), h Huber's, V_clipped at most `clip` from the value of the rollout.

    values, old, returns (N, 1), or (N, K) of a critic that values every step. critic/sum_*: see `explained_sums`.
    """
    counts = mean.mask if values.shape[1] == mean.mask.shape[1] else mean.mask.any(1, keepdim=True)
    values, old, returns = (masked(x, counts) for x in (values, old, returns))
    moved = values - old
    losses = torch.maximum(huber(returns - values, delta), huber(returns - old - moved.clamp(-clip, clip), delta))
    loss = mean.loss(losses)
    sums = explained_sums(values.detach(), returns, counts)
    metrics = {
        "critic/value_loss": loss.detach(),
        "critic/value_clip_ratio": mean.metric((moved.abs() > clip).float()),
        "critic/explained_variance": explained_variance(sums),
    }
    return loss, metrics | {f"critic/sum_{name}": part for name, part in zip(SUMS, sums, strict=True)}


def huber(error: Tensor, delta: float) -> Tensor:
    """e^2 / 2 within delta, delta (|e| - delta / 2) beyond."""
    size = error.abs()
    return torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def explained_sums(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """(5,) float64, which add up over micro-batches and processes: count, sums of R, R^2, e, e^2 with e = R - V."""
    mask = mask.expand_as(returns)
    target = masked(returns.double(), mask)
    error = masked(returns.double() - values.double(), mask)
    return torch.stack([mask.sum().double(), target.sum(), target.square().sum(), error.sum(), error.square().sum()])


def explained_variance(sums: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) from `explained_sums`; NaN with fewer than two values or none that differ.

    A constant offset of the values does not lower it."""
    count, total, squares, errors, errors_squared = sums
    spread = squares - total.square() / count
    rest = errors_squared - errors.square() / count
    flat = spread <= 1e-12 * squares  # of rounding alone
    return torch.where((count < 2) | flat, torch.full_like(count, torch.nan), 1 - rest / spread).float()


def entropy_loss(entropy: Tensor, mean: Mean) -> tuple[Tensor, Metrics]:
    """The mean entropy, to be raised: (N, 1), (N, K) or (N, K, A)."""
    counts = mean.mask.any(1, keepdim=True) if entropy.shape[1] == 1 else mean.counts(entropy.ndim)
    loss = mean.loss(masked(entropy, counts))
    return loss, {"actor/entropy_loss": loss.detach()}


def divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference), entry by entry: exp(-d) + d - 1 of d = log pi - log pi_ref, never
    negative (k3 of http://joschu.net/blog/kl-approx.html).

    Below d = -3 it goes on as its tangent: steep but finite, and still pulling back a policy that strayed far.
    """
    towards = reference - log_probs
    near = towards.clamp(max=STEEPEST)
    beyond = math.exp(STEEPEST) * (1 + towards - STEEPEST)
    return torch.where(towards > STEEPEST, beyond, near.exp()) - towards - 1


def kl_loss(log_probs: Tensor, reference: Tensor, mean: Mean) -> tuple[Tensor, Metrics]:
    """The mean divergence of the numbers of actions from those of a reference policy, both (N, K, A)."""
    counts = mean.counts(3)
    loss = mean.loss(divergence(masked(log_probs, counts), masked(reference, counts)))
    return loss, {"actor/kl_to_reference": loss.detach()}


def _clipped(ratios: Tensor, advantages: Tensor, mean: Mean, clip: Clip) -> tuple[Tensor, Metrics]:
    """The clipped loss of each entry, and how often it was clipped."""
    advantages = masked(advantages, mean.mask)
    advantages = advantages.reshape(*advantages.shape, *[1] * (ratios.ndim - 2))
    ratio = ratios.exp()
    free, held = -advantages * ratio, -advantages * clip(ratio)
    losses = torch.maximum(free, held)
    metrics = {"actor/clip_fraction": mean.metric((free < held).float())}
    if clip.dual is not None:
        most = advantages.abs() * clip.dual
        metrics["actor/dual_clip_fraction"] = mean.metric((losses > most).float())
        losses = torch.minimum(losses, most)
    return losses, metrics
