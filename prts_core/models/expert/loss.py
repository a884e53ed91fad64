"""Flow matching for action chunks: the time distribution, the noised chunk, the masked squared error. Knows no network.

t runs from 0 (noise) to 1 (data): x_t = (1 - t) eps + t a, target velocity v = a - eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE_CEILING = 0.999


def draw_time(count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """(count,) times with the mass near the noise: raw ~ Beta(1.5, 1), t = (0.999 - min(raw, 0.999)) / 0.999."""
    # The inverse distribution function of Beta(1.5, 1) is u^(2/3); torch's Beta takes no generator.
    raw = torch.rand(count, generator=generator, device=device).pow(1.0 / 1.5)
    return time_from_beta(raw)


def time_from_beta(raw: Tensor) -> Tensor:
    return (NOISE_CEILING - raw.clamp(max=NOISE_CEILING)) / NOISE_CEILING


def mix_noise(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, A) clean chunk and noise, (B,) time -> (x_t, target velocity), both (B, T, A)."""
    t = time[:, None, None]
    return (1 - t) * noise + t * actions, actions - noise


def flow_loss(velocity: Tensor, target: Tensor, dof_mask: Tensor, is_pad: Tensor) -> Tensor:
    """Mean squared error over each sample's own real dimensions and real steps, then over samples.

    velocity, target, dof_mask (B, T, A); is_pad (B, T) bool. Per-sample masks let one batch mix embodiments (the public
    code reads the valid width from sample 0).
    """
    weight = dof_mask * (~is_pad)[..., None]
    error = (velocity - target).square() * weight
    return (error.sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)).mean()
