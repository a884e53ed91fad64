"""Role-aware attention by torch's scaled_dot_product_attention: any device, any dtype.

Long rows go in blocks of queries against the keys that a block sees, which skips most of what the mask hides; short
rows go side by side with a dense mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prts_kernels.role_attention.attention_spec import AttentionSpec
from prts_kernels.role_attention.mask import QueryBlock, RoleMask

QUERY_BLOCK = {"cpu": 64}  # queries; on a CPU 32 to 128 are about alike
QUERY_BLOCK_ELSEWHERE = 1024


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why this cannot be computed here, or None."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D) in q's dtype."""
    q, k, v = (x.reshape(mask.rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    block = QUERY_BLOCK.get(q.device.type, QUERY_BLOCK_ELSEWHERE)
    by_block = q.shape[2] >= 2 * block
    # torch's CPU kernels give 0 and zero gradients for fully masked queries; CUDA backends differ.
    safe = mask.padded and not (q.device.type == "cpu" and _padding_is_finite(q, k, v, mask))
    if safe:  # values in padding (NaN too) must reach neither sums nor gradients
        fully_masked, unused = mask.fully_masked_queries[:, None, :, None], mask.unused_keys[:, None, :, None]
        q, k, v = q.masked_fill(fully_masked, 0), k.masked_fill(unused, 0), v.masked_fill(unused, 0)
    if by_block:
        out = _by_query_block(q, k, v, mask.query_blocks(block, safe), scale)
    else:
        out = _attend(q, k, v, mask.dense_safe if safe else mask.dense, scale)
    if safe:
        out = out.masked_fill(fully_masked, 0)
    return out.transpose(1, 2).flatten(0, 1)


def _by_query_block(q: Tensor, k: Tensor, v: Tensor, query_blocks: list[QueryBlock], scale: float) -> Tensor:
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
        for s in query_blocks
    ]
    return torch.cat(out, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None], scale=scale, enable_gqa=gqa)


def _padding_is_finite(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask) -> bool:
    """Whether 0 * x is 0 for everything that lies in padding; reads the padding only, cheaper than wiping it."""
    return all(
        bool(x.detach().transpose(1, 2)[where].isfinite().all())
        for x, where in ((q, mask.fully_masked_queries), (k, mask.unused_keys), (v, mask.unused_keys))
    )
