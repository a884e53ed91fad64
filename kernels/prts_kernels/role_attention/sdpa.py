"""Role-aware attention by torch's scaled_dot_product_attention with a dense mask: any device, any dtype.

On a CPU, long rows go in stripes of queries against the keys that a stripe sees, which skips most of what the mask
hides; elsewhere nothing is skipped and the cost is that of full attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prts_kernels.role_attention.mask import RoleMask

STRIPE = 64  # queries; of 32 to 128 about alike


def unfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these tensors cannot be computed here, or None."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    """q (B, Hq, L, D), k and v (B, Hkv, L, D) -> (B, Hq, L, D) in q's dtype."""
    if not mask.padded or (q.device.type == "cpu" and _padding_is_finite(q, k, v, mask)):
        # torch's CPU kernels give 0 and zero gradients for blind rows
        if q.device.type == "cpu" and mask.length >= 2 * STRIPE:
            return _attend_in_stripes(q, k, v, mask, scale)
        return _attend(q, k, v, mask.dense, scale)
    # Values in padding (NaN included) must reach neither sums nor gradients, and CUDA backends differ on blind rows.
    blind, dead = mask.blind_rows[:, None, :, None], mask.dead_keys[:, None, :, None]
    clean = q.masked_fill(blind, 0), k.masked_fill(dead, 0), v.masked_fill(dead, 0)
    return _attend(*clean, mask.dense_open, scale).masked_fill(blind, 0)


def _attend_in_stripes(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    out = [
        scaled_dot_product_attention(
            q[:, :, s.start : s.stop], k[:, :, s.first : s.last], v[:, :, s.first : s.last], attn_mask=s.visible,
            scale=scale, enable_gqa=gqa,
        )
        for s in mask.stripes(STRIPE)
    ]  # fmt: skip
    return torch.cat(out, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None], scale=scale, enable_gqa=gqa)


def _padding_is_finite(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask) -> bool:
    """Whether 0 * x is 0 for everything that lies in padding; reads the padding only, cheaper than wiping it."""
    return all(
        bool(x.detach().transpose(1, 2)[where].isfinite().all())
        for x, where in ((q, mask.blind_rows), (k, mask.dead_keys), (v, mask.dead_keys))
    )
