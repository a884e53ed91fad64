"""Eager RMS norm and rotary embedding: the specification of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def unfit(device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str | None:
    """Why these tensors cannot be computed here, or None."""
    return None


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (T, H, D), weight (D,), cos and sin (T, D) -> (T, H, D) in x's dtype."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(kind)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(kind)
    first, second = y.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    out = y * cos.to(kind)[:, None] + turned * sin.to(kind)[:, None]
    return out.to(x.dtype).contiguous()
