"""Role-aware attention by torch's scaled_dot_product_attention: any device, any dtype.

Long rows go in stripes of queries against the keys that a stripe sees, which skips most of what the mask hides; short
rows go side by side with a dense mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prts_kernels.role_attention.case import Case
from prts_kernels.role_attention.mask import RoleMask, Stripe

STRIPE = {"cpu": 64}  # queries; on a CPU 32 to 128 are about alike
STRIPE_ELSEWHERE = 1024


def unfit(case: Case) -> str | None:
    """Why this cannot be computed here, or None."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D) in q's dtype."""
    q, k, v = (x.reshape(mask.rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    stripe = STRIPE.get(q.device.type, STRIPE_ELSEWHERE)
    striped = q.shape[2] >= 2 * stripe
    if not mask.padded or (q.device.type == "cpu" and _padding_is_finite(q, k, v, mask)):
        # torch's CPU kernels give 0 and zero gradients for blind rows
        out = _in_stripes(q, k, v, mask.stripes(stripe), scale) if striped else _attend(q, k, v, mask.dense, scale)
    else:
        # Values in padding (NaN too) must reach neither sums nor gradients, and CUDA backends differ on blind rows.
        blind, dead = mask.blind_rows[:, None, :, None], mask.dead_keys[:, None, :, None]
        q, k, v = q.masked_fill(blind, 0), k.masked_fill(dead, 0), v.masked_fill(dead, 0)
        if striped:
            out = _in_stripes(q, k, v, mask.stripes(stripe, blind_see=True), scale)
        else:
            out = _attend(q, k, v, mask.dense_open, scale)
        out = out.masked_fill(blind, 0)
    return out.transpose(1, 2).flatten(0, 1)


def _in_stripes(q: Tensor, k: Tensor, v: Tensor, stripes: list[Stripe], scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    out = [
        scaled_dot_product_attention(
            q[:, :, s.start : s.stop],
            k[:, :, s.first : s.stop],
            v[:, :, s.first : s.stop],
            attn_mask=s.visible,
            scale=scale,
            enable_gqa=gqa,
        )
        for s in stripes
    ]
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
