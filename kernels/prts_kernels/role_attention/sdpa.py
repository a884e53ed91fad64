"""Role-aware attention by torch's scaled_dot_product_attention with a dense mask: any device, any dtype.

It does not skip invisible tiles: cost is that of full attention.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prts_kernels.role_attention.mask import RoleMask


def unfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these tensors cannot be computed here, or None."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    """q (B, Hq, L, D), k and v (B, Hkv, L, D) -> (B, Hq, L, D) in q's dtype."""
    if not mask.padded or (q.device.type == "cpu" and _padding_is_finite(q, k, v, mask)):
        return _attend(q, k, v, mask.dense, scale)  # torch's CPU kernels give 0 and zero gradients for blind rows
    # Values in padding (NaN included) must reach neither sums nor gradients, and CUDA backends differ on blind rows.
    blind, dead = mask.blind_rows[:, None, :, None], mask.dead_keys[:, None, :, None]
    clean = q.masked_fill(blind, 0), k.masked_fill(dead, 0), v.masked_fill(dead, 0)
    return _attend(*clean, mask.dense_open, scale).masked_fill(blind, 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None], scale=scale, enable_gqa=gqa)


def _padding_is_finite(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask) -> bool:
    """Whether 0 * x is 0 for everything that lies in padding; reads the padding only, cheaper than wiping it."""
    return all(
        bool(x.detach().transpose(1, 2)[where].isfinite().all())
        for x, where in ((q, mask.blind_rows), (k, mask.dead_keys), (v, mask.dead_keys))
    )
