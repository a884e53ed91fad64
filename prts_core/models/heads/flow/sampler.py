"""Euler integration of the velocity field from noise to an action chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def sample_actions(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """`velocity(x (B, T, A), time (B,)) -> (B, T, A)`; K = steps Euler steps dt = 1/K at t = k/K from `noise`, in the
    precision of `noise`, whatever the network computes in."""
    x = noise
    for k in range(steps):
        time = torch.full((x.shape[0],), k / steps, device=x.device, dtype=torch.float32)
        x = x + velocity(x, time).to(x.dtype) / steps
    return x
