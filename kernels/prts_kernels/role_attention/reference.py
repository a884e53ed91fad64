"""Eager role-aware attention in fp32 (fp64 for fp64 input): the specification of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from prts_kernels.role_attention.attention_spec import AttentionSpec
from prts_kernels.role_attention.mask import RoleMask


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why this cannot be computed here, or None."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D) in q's dtype."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    fully_masked, unused = mask.fully_masked_queries[:, :, None, None], mask.unused_keys[:, :, None, None]
    groups = q.shape[1] // k.shape[1]
    q_, k_, v_ = (x.to(kind).reshape(mask.rows, -1, *x.shape[1:]) for x in (q, k, v))
    # What lies in unused keys and fully masked queries may be NaN, and 0 * NaN would leak into sums.
    q_ = q_.masked_fill(fully_masked, 0)
    k_ = k_.masked_fill(unused, 0).repeat_interleave(groups, dim=2)
    v_ = v_.masked_fill(unused, 0).repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q_, k_) * scale
    hidden = torch.finfo(kind).min  # finite: a fully masked query stays a number
    scores = scores.masked_fill(~mask.dense[:, None], hidden)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v_)
    return out.masked_fill(fully_masked, 0).to(q.dtype).reshape(q.shape)
