"""Sample a chunk that goes on from the one a robot is still executing (real-time chunking, arXiv:2506.07339).

A robot does not wait for the policy: by the time a chunk arrives, `delay` more rows of the one before have been
executed. Guided: every Euler step is pulled towards those rows, and less and less towards the rows after them, through
the network's Jacobian; any flow policy can do it. Trained (arXiv:2512.05964): a policy that was fine-tuned with such
rows given reads them as what they are, at their own time 1, and costs no gradient. In both the rows that are executed
anyway come out as they were given, to the bit.

Time runs from noise (0) to data (1). Shape legend: S samples, T chunk length, A padded action width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prts_core.io.errors import ConfigError

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (S, T, A), time (S,) or (S, T) -> (S, T, A)
NEAREST, FURTHEST = 0.01, 0.99  # of the time: the guidance's coefficient is infinite at both ends
GUIDED_STEPS = 3  # Jacobians are asked of the first steps, where a chunk takes its shape
MOST_GUIDANCE = 5.0


@dataclass(frozen=True)
class Committed:
    """What a robot is executing while the policy looks.

    rows (S, T, A): normalised, the first being the next to be executed; where the old chunk has ended, its last row
    held. delay (S,) int64: rows that will have been executed when the new chunk arrives. executed (S,) int64: rows of
    a chunk between two looks. 0 <= delay <= executed <= T - delay; without an old chunk 0 and T.
    """

    rows: Tensor
    delay: Tensor
    executed: Tensor


def require_fits(delay: int, executed: int, length: int) -> None:
    """ConfigError where a chunk of `length` rows cannot bridge the delay."""
    if not 0 <= delay <= executed <= length - delay:
        raise ConfigError(
            "A chunk is too short for real-time chunking at this delay",
            field="delay",
            found=f"delay {delay}, executed {executed}, chunk {length}",
            expected="0 <= delay <= executed <= chunk - delay",
            cure="execute more rows of a chunk, or serve the policy faster",
        )


def prefix_weights(delay: Tensor, executed: Tensor, length: int) -> Tensor:
    """How firmly each row holds to the old chunk, (S, T) float64: 1 for rows executed anyway, falling to 0 where the
    old chunk ends."""
    row = torch.arange(length, dtype=torch.float64, device=delay.device)
    own = delay.double()[:, None]
    end = length - executed.double()[:, None]
    left = (end - row) / (end - own + 1)
    ramp = left * torch.expm1(left) / (math.e - 1)
    return torch.where(row < own, 1.0, torch.where(row < end, ramp, 0.0))


def guidance(time: float, most: float = MOST_GUIDANCE) -> float:
    """The correction's coefficient at a time: what the noise that is left allows, at most `most`."""
    t = min(max(time, NEAREST), FURTHEST)
    left = 1.0 - t
    return min(most, left / t * (t * t + left * left) / (left * left))


def guided_velocity(
    velocity: Velocity, x: Tensor, time: float, target: Tensor, weights: Tensor, most: float = MOST_GUIDANCE
) -> Tensor:
    """The velocity at x, pulled towards `target` (S, T, A) by `weights` (S, T), through the Jacobian of the chunk that
    the network foresees."""
    at = torch.full((len(x),), time, device=x.device, dtype=torch.float32)
    with torch.enable_grad():
        free = x.detach().requires_grad_(True)
        v = velocity(free, at).to(x.dtype)
        foreseen = free + (1.0 - time) * v
        wrong = ((target - foreseen) * weights.to(x.dtype)[..., None]).detach()
        pull = torch.autograd.grad(foreseen, free, wrong)[0]
    return (v + guidance(time, most) * pull).detach()


@torch.no_grad()
def sample_guided(
    velocity: Velocity,
    noise: Tensor,
    steps: int,
    committed: Committed,
    guided_steps: int | None = GUIDED_STEPS,
    most: float = MOST_GUIDANCE,
    fixed: bool = True,
) -> Tensor:
    """Euler steps from `noise` as `sampler.sample_actions`, the first `guided_steps` (none: all) of them guided.

    fixed: rows that are executed anyway are those that were given. Nothing of `velocity` may be an inference tensor.
    """
    weights = prefix_weights(committed.delay, committed.executed, noise.shape[1])
    target, x = committed.rows.to(noise.dtype), noise
    for k in range(steps):
        if k < (steps if guided_steps is None else guided_steps):
            v = guided_velocity(velocity, x, k / steps, target, weights, most)
        else:
            v = velocity(x, torch.full((len(x),), k / steps, device=x.device, dtype=torch.float32)).to(x.dtype)
        x = x + v / steps
    return torch.where(_held(committed.delay, noise.shape[1]), target, x) if fixed else x


@torch.no_grad()
def sample_trained(velocity: Velocity, noise: Tensor, steps: int, committed: Committed) -> Tensor:
    """Euler steps of a policy that was trained with given rows: those are at time 1 from the start and do not move."""
    held = _held(committed.delay, noise.shape[1])
    target = committed.rows.to(noise.dtype)
    x = torch.where(held, target, noise)
    for k in range(steps):
        time = torch.full(x.shape[:2], k / steps, device=x.device, dtype=torch.float32).masked_fill(held[..., 0], 1.0)
        x = torch.where(held, target, x + velocity(x, time).to(x.dtype) / steps)
    return x


def draw_delays(count: int, longest: int, length: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 rows to be given in training, alike likely from 0 to `longest`, which is less than `length`."""
    if not 0 <= longest < length:
        raise ConfigError("A chunk cannot be given whole", field="delay", found=longest, expected=f"0 to {length - 1}")
    return torch.randint(0, longest + 1, (count,), generator=generator, device=generator.device)


def give_rows(actions: Tensor, noise: Tensor, time: Tensor, delay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The training sample whose first `delay` (S,) rows are given: (x (S, T, A), time (S, T), counted (S, T) bool).

    actions, noise (S, T, A), time (S,). Rows that were given are the action itself, at time 1, and count in no loss.
    """
    held = _held(delay, actions.shape[1])[..., 0]
    each = time[:, None].expand(-1, actions.shape[1]).masked_fill(held, 1.0)
    mixed = each[..., None] * actions + (1.0 - each[..., None]) * noise
    return mixed, each, ~held


def _held(delay: Tensor, length: int) -> Tensor:
    """(S, T, 1) bool: rows that are executed anyway."""
    return (torch.arange(length, device=delay.device) < delay[:, None])[..., None]
