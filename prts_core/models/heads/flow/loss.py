"""Flow matching for action chunks: the noised chunk and the masked squared error.

x_t = (1 - t) eps + t a, target velocity v = a - eps (rectified flow, arXiv:2209.03003). `compat` "none" treats every
sample by its own real dimensions, so that one batch mixes embodiments; "prts" repeats the public code, on which
released checkpoints were trained: noise on padded dimensions too, and the width of sample 0 for the whole batch.

Shape legend: S samples, T chunk length, A padded action width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.config.model import Compat


def mix_noise(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """(S, T, A) clean chunk and noise, (S,) time -> (x_t, target velocity), both (S, T, A)."""
    t = time[:, None, None]
    return (1 - t) * noise + t * actions, actions - noise


def mask_noise(x: Tensor, dof_mask: Tensor, compat: Compat = "none") -> Tensor:
    """Noise or velocity as a network meets it, (S, T, A). Under "none" padded dimensions stay 0, in training as in
    sampling, so that nothing is asked of the network that it cannot explain; under "prts" all of them take part."""
    return x if compat == "prts" else x * dof_mask


def flow_loss(
    velocity: Tensor,
    target: Tensor,
    dof_mask: Tensor | None = None,
    is_pad: Tensor | None = None,
    compat: Compat = "none",
) -> Tensor:
    """Mean squared error over real dimensions and real steps, a scalar.

    velocity, target, dof_mask (S, T, A), is_pad (S, T) bool; no mask means all real. "none": over each sample's own
    entries, then over samples. "prts": over the first mask[0, 0].sum() dimensions of all samples at once.
    """
    mask = torch.ones_like(velocity) if dof_mask is None else dof_mask
    real = velocity.new_ones(velocity.shape[:2]) if is_pad is None else (~is_pad).to(velocity.dtype)
    error = (velocity - target).square()
    if compat == "prts":
        width = mask[0, 0].sum()  # stays on the device
        counted = real[..., None] * (torch.arange(mask.shape[-1], device=mask.device) < width)
        return (error * counted).sum() / (real.sum() * width).clamp(min=1)
    weight = mask * real[..., None]
    return ((error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)).mean()
