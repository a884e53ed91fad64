"""Draw action chunks from a flow with a density that is known, and compute that density again with gradients.

Euler's steps from noise to data give no density; a step to which Gaussian noise is added does. With N steps at times
k/N from noise (0) to data (1), d = 1/N, a velocity v, the noise n = x - t v that it points away from and r = 1 - t - d:

    flow_sde    mean x + d v - n a^2 d / (2 max(t, d)),    deviation a sqrt(d (1 - t) / max(t, d))
    flow_cps    mean x + d v - n r (1 - cos(a pi / 2)),    deviation r sin(a pi / 2): 0 in the last step
    flow_noise  mean x + d v,                              deviation learned (FlowNoiseNet)

(pi_RL, arXiv:2510.25889, whose time runs the other way.) One step of the chain is random and the others are Euler's, or
all of them are (`joint`). Nothing here draws: noise and indices come from the caller, so that an episode is the same
whatever runs beside it. Dimensions that the mask pads follow Euler's steps alone and carry a log-probability of 0.

Correlated noise e of the rows of a chunk is an autoregression, e_i = rho e_(i-1) + sqrt(1 - rho^2) z_i: a row's
log-probability is that given the rows before it, so that those of the first rows sum to the density of these rows.

Shape legend: S samples, N steps, T chunk length, A padded action width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prts_core.config.rl import ExplorationConfig
from prts_core.io.errors import ConfigError

# (x (S, T, A), time (S,)) -> velocity (S, T, A) and, for flow_noise alone, the deviation (S, T, A).
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class FlowNoiseNet(nn.Module):
    """Deviation of every number of an action from what the head computes it from: three linear layers, tanh between
    them and at the end, which is stretched so that the variance's logarithm lies between those of `noise_range`.

    The last layer starts at 0: in the middle of the range.
    """

    def __init__(
        self, width: int, action_dim: int, noise_range: tuple[float, float], hidden: tuple[int, int] = (128, 64)
    ) -> None:
        super().__init__()
        self.low, self.high = (2.0 * math.log(end) for end in noise_range)
        first, second, last = nn.Linear(width, hidden[0]), nn.Linear(*hidden), nn.Linear(hidden[1], action_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last, nn.Tanh())

    def forward(self, features: Tensor) -> Tensor:
        """(..., width) -> (..., action_dim)."""
        with torch.autocast(features.device.type, enabled=False):  # its digits are those of a density
            share = 0.5 * (self.layers(features.to(next(self.parameters()).dtype)) + 1.0)
            return torch.exp(0.5 * (self.low + (self.high - self.low) * share))


@dataclass
class Chain:
    """states (S, N+1, T, A): from noise to the normalised chunk, states[:, -1]. step (S,) int64: the random transition;
    of no meaning where all are. log_probs (S, T, A) float32. entropy (S, T, A) float32, of a learned deviation alone:
    that of another is a constant."""

    states: Tensor
    step: Tensor
    log_probs: Tensor
    entropy: Tensor | None


def random_steps(exploration: ExplorationConfig, steps: int) -> range:
    """Which of a chain's steps may be the random one. ConfigError where the one that is asked for is none of them."""
    if exploration.method == "flow_cps" and not exploration.level <= 1:
        raise ConfigError(
            "flow_cps mixes noise by an angle of level * 90 degrees",
            field="exploration.level",
            found=exploration.level,
            expected="at most 1",
        )
    if exploration.joint:
        return range(steps)
    last = steps - 1 if exploration.method == "flow_cps" else steps
    if exploration.step is None:
        allowed = range(last)
    else:
        step = steps - 1 if exploration.step == -1 else exploration.step
        allowed = range(step, step + 1) if step < last else range(0)
    if not allowed:
        raise ConfigError(
            f"No such step of a chain of {steps} can be the random one"
            + (": the last one of flow_cps adds no noise, so nothing would be explored" if last < steps else ""),
            field="exploration.step",
            found=exploration.step,
            expected=f"0 to {last - 1}" if last else "a head with more denoise_steps",
        )
    return allowed


def choose_step(uniform: Tensor, steps: int, exploration: ExplorationConfig) -> Tensor:
    """(S,) numbers in [0, 1) -> the random step of each sample's chain (S,) int64."""
    allowed = random_steps(exploration, steps)
    return allowed.start + (uniform.double() * len(allowed)).long().clamp(max=len(allowed) - 1)


@torch.no_grad()
def draw_chain(
    field: Field,
    start: Tensor,
    mask: Tensor,
    steps: int,
    exploration: ExplorationConfig,
    noise: Tensor,
    step: Tensor,
    start_noise: float = 1.0,
) -> Chain:
    """A chain from `start` (S, T, A), which is noise of deviation `start_noise`.

    mask (S, T, A): 1 where a dimension is real, alike in all rows. noise (S, N, T, A): standard normal; that of a step
    which is not random is not read. step (S,) int64: the random one, not read where all are. States and densities are
    computed in the precision of `start`, whatever the network computes in.
    """
    random_steps(exploration, steps)
    states, terms = [start], []
    mixed = correlate(noise, exploration.correlation)
    for k in range(steps):
        at = torch.full_like(step, k)
        chosen = torch.ones_like(step, dtype=torch.bool) if exploration.joint else step == k
        mean, std = transition(field, states[-1], at, chosen, mask, steps, exploration)
        states.append(torch.where(std > 0, mean + std * mixed[:, k], mean))
        terms.append(_terms(states[-1], mean, std, exploration))
    found = _mean(terms, start, mask, start_noise) if exploration.joint else _chosen(terms, step)
    return Chain(torch.stack(states, 1), step, *found)


def chain_log_probs(
    field: Field,
    states: Tensor,
    step: Tensor,
    mask: Tensor,
    steps: int,
    exploration: ExplorationConfig,
    start_noise: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropy of a stored chain (S, N+1, T, A), as in Chain, with gradients.

    One random step: the field is asked once, at each sample's own state and time. Joint: once a step; the result is the
    MEAN over the start's term and the N steps, as in the public code: a ratio of two policies is then the (N+1)-th
    root of that of their densities.
    """
    random_steps(exploration, steps)
    if not exploration.joint:
        sample = torch.arange(len(states), device=states.device)
        return step_log_probs(field, states[sample, step], states[sample, step + 1], step, mask, steps, exploration)
    terms = []
    for k in range(steps):
        at, chosen = torch.full_like(step, k), torch.ones_like(step, dtype=torch.bool)
        mean, std = transition(field, states[:, k], at, chosen, mask, steps, exploration)
        terms.append(_terms(states[:, k + 1], mean, std, exploration))
    return _mean(terms, states[:, 0], mask, start_noise)


def step_log_probs(
    field: Field, x: Tensor, after: Tensor, step: Tensor, mask: Tensor, steps: int, exploration: ExplorationConfig
) -> tuple[Tensor, Tensor | None]:
    """Of the random step (S,) of each sample alone, from the states before and after it, (S, T, A) both."""
    mean, std = transition(field, x, step, torch.ones_like(step, dtype=torch.bool), mask, steps, exploration)
    return _terms(after, mean, std, exploration)


def transition(
    field: Field,
    x: Tensor,
    step: Tensor,
    chosen: Tensor,
    mask: Tensor,
    steps: int,
    exploration: ExplorationConfig,
) -> tuple[Tensor, Tensor]:
    """Mean and deviation (S, T, A) of the state that follows x (S, T, A) in step `step` (S,). chosen (S,) bool: which
    samples' step is random; the others' mean is Euler's and their deviation 0, and so it is of padded dimensions."""
    # The times of sample_actions: Euler's steps are then the very ones that a policy acts by.
    times = torch.tensor([k / steps for k in range(steps)], device=x.device, dtype=torch.float32)
    velocity, deviation = field(x, times[step])
    velocity = velocity.to(x.dtype)
    euler = x + velocity / steps
    random = chosen[:, None, None] & (mask > 0)
    if exploration.method == "flow_noise":
        assert deviation is not None, "flow_noise asks a field for its deviation"
        return euler, torch.where(random, deviation.to(x.dtype), 0.0)
    pull, std = (y.to(x.device, x.dtype)[step][:, None, None] for y in schedule(exploration, steps))
    away = x - times[step].to(x.dtype)[:, None, None] * velocity
    return torch.where(random, euler - pull * away, euler), torch.where(random, std, 0.0)


def schedule(exploration: ExplorationConfig, steps: int) -> tuple[Tensor, Tensor]:
    """Of every step, float64 (N,) both: how much of the noise n is taken off, and the deviation (not of flow_noise)."""
    d, a = 1.0 / steps, exploration.level
    t = torch.arange(steps, dtype=torch.float64) / steps
    if exploration.method == "flow_sde":
        near = t.clamp(min=d)  # at t = 0 the equation's own coefficient is infinite
        return a * a * d / (2.0 * near), a * (d * (1.0 - t) / near).sqrt()
    left = torch.arange(steps - 1, -1, -1, dtype=torch.float64) / steps  # 1 - t - d, 0 to the last digit
    return left * (1.0 - math.cos(0.5 * math.pi * a)), left * math.sin(0.5 * math.pi * a)


def correlate(noise: Tensor, rho: float) -> Tensor:
    """Independent normal numbers (..., T, A) -> such whose rows i and j have correlation rho^|i-j|."""
    if not rho:
        return noise
    row = torch.arange(noise.shape[-2], device=noise.device)
    gap = row[:, None] - row
    factor = torch.where(gap >= 0, rho ** gap.clamp(min=0).double(), 0.0)
    factor[:, 1:] *= math.sqrt(1.0 - rho * rho)
    return factor.to(noise.dtype) @ noise


def log_density(after: Tensor, mean: Tensor, std: Tensor, rho: float = 0.0) -> Tensor:
    """Log-density (S, T, A) of each number given those of the rows before it; 0 where the deviation is 0."""
    known = std == 0
    safe = std.masked_fill(known, 1.0)
    z = (after - mean) / safe
    scale = safe.log() + HALF_LOG_2PI
    if rho:
        own = math.sqrt(1.0 - rho * rho)
        z = torch.cat([z[:, :1], (z[:, 1:] - rho * z[:, :-1]) / own], 1)
        scale = torch.cat([scale[:, :1], scale[:, 1:] + math.log(own)], 1)
    return (-0.5 * z.square() - scale).masked_fill(known, 0.0)


def entropy_of(std: Tensor, rho: float = 0.0) -> Tensor:
    """Entropy (S, T, A) of each number given those of the rows before it; 0 where the deviation is 0."""
    known = std == 0
    rest = torch.full_like(std, HALF_LOG_2PI + 0.5)
    rest[:, 1:] += 0.5 * math.log(1.0 - rho * rho)
    return (std.masked_fill(known, 1.0).log() + rest).masked_fill(known, 0.0)


def _terms(after: Tensor, mean: Tensor, std: Tensor, exploration: ExplorationConfig) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropy of one step, (S, T, A) float32 both."""
    learned = exploration.method == "flow_noise"
    entropy = entropy_of(std, exploration.correlation).float() if learned else None
    return log_density(after, mean, std, exploration.correlation).float(), entropy


def _chosen(terms: list[tuple[Tensor, Tensor | None]], step: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of each sample's random step."""
    sample = torch.arange(len(step), device=step.device)
    log_probs = torch.stack([own for own, _ in terms], 1)[sample, step]
    entropies = [entropy for _, entropy in terms if entropy is not None]
    return log_probs, torch.stack(entropies, 1)[sample, step] if entropies else None


def _mean(
    terms: list[tuple[Tensor, Tensor | None]], start: Tensor, mask: Tensor, start_noise: float
) -> tuple[Tensor, Tensor | None]:
    """Of a chain's start, which is independent noise, and all of its steps."""
    deviation = torch.full_like(start, start_noise) * (mask > 0)
    first = log_density(start, torch.zeros_like(start), deviation).float()
    log_probs = torch.stack([first, *(own for own, _ in terms)], 1).mean(1)
    entropies = [entropy for _, entropy in terms if entropy is not None]
    return log_probs, torch.stack([entropy_of(deviation).float(), *entropies], 1).mean(1) if entropies else None
