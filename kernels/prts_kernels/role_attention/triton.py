"""Role-aware attention by our own Triton kernels, mask inside: invisible tiles are never visited.

Cost follows the visible area (0.9 of varlen-causal); forward and backward give the same bits on every run. It does not
know the role table. `TRITON_INTERPRET=1` in the environment before first use runs it on the CPU, for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prts_kernels.role_attention.mask import RoleMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Blocks:
    """Queries and keys a tile, warps and pipeline stages of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


def unfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these tensors cannot be computed here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if q.device.type != "cuda" and not _interpreted():
        return f"it runs on CUDA devices, found {q.device.type}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        found = ", ".join(sorted({str(x.dtype) for x in (q, k, v)}))
        return f"dtypes are one of {', '.join(map(str, DTYPES))} for q, k and v alike, found {found}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim is one of {HEAD_DIMS}, found {q.shape[-1]}"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float, blocks: tuple[Blocks, Blocks, Blocks] | None = None
) -> Tensor:
    """q (B, Hq, L, D), k and v (B, Hkv, L, D) -> (B, Hq, L, D) in q's dtype.

    blocks: tile sizes of the kernels (forward, dK and dV, dQ); by default chosen by head size and dtype.
    """
    if q.numel() == 0:
        return q * 1.0
    return _RoleAttention.apply(q, k, v, mask, scale, blocks or default_blocks(q))


def default_blocks(q: Tensor) -> tuple[Blocks, Blocks, Blocks]:
    """Tile sizes by what compiles for sm_90 with tensor cores and few or no spills. Not measured on a GPU yet."""
    if _interpreted():
        return (Blocks(16, 16, 1, 1),) * 3
    if q.dtype == torch.float32:
        return (Blocks(32, 32, 8, 1),) * 3
    if q.shape[-1] > 64:
        return (Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 2), Blocks(128, 64, 8, 2))
    return (Blocks(128, 64, 4, 3), Blocks(32, 128, 8, 2), Blocks(128, 64, 8, 2))


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class _RoleAttention(torch.autograd.Function):
    """Keeps q, k, v, out and the base-2 log-sum-exp of each query for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float, blocks: tuple) -> Tensor:
        from prts_kernels.role_attention import triton_kernels

        q, k, v = (_unit_stride(x) for x in (q, k, v))
        batch, heads, length, _ = q.shape
        out = torch.empty_like(q)
        lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
        tile = blocks[0]
        visits = mask.visits(tile.queries, tile.keys)
        triton_kernels.forward_kernel[visits.n_whole.shape[1], batch * heads](
            q, k, v, mask.key_end, visits.whole, visits.n_whole, visits.part, visits.n_part, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            heads, length, visits.whole.shape[1], visits.whole.shape[2], scale * math.log2(math.e),
            **_constants(q, k, tile),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.blocks = mask, scale, blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from prts_kernels.role_attention import triton_kernels

        q, k, v, out, lse = ctx.saved_tensors
        mask: RoleMask = ctx.mask
        dout = _unit_stride(grads[0])
        batch, heads, length, dim = q.shape
        scale_log2 = ctx.scale * math.log2(math.e)
        delta = torch.empty_like(lse)
        triton_kernels.delta_kernel[_tiles(length, 64), batch * heads](
            out, dout, lse, delta, *out.stride()[:3], *dout.stride()[:3], heads, length, D=dim, BM=64
        )
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
        _, dkdv_tile, dq_tile = ctx.blocks

        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        low, high = mask.tiles(dkdv_tile.keys)
        triton_kernels.dkdv_kernel[low.shape[1], batch * k.shape[1]](
            q, k, v, dout, lse, delta, mask.key_end, low, high, dk, dv, *strides,
            heads, length, _tiles(length, dkdv_tile.queries), low.shape[1], scale_log2, ctx.scale,
            **_constants(q, k, dkdv_tile),
        )  # fmt: skip

        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        visits = mask.visits(dq_tile.queries, dq_tile.keys)
        triton_kernels.dq_kernel[visits.n_whole.shape[1], batch * heads](
            q, k, v, dout, lse, delta, mask.key_end, visits.whole, visits.n_whole, visits.part, visits.n_part, dq,
            *strides, heads, length, visits.whole.shape[1], visits.whole.shape[2], scale_log2, ctx.scale,
            **_constants(q, k, dq_tile),
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _constants(q: Tensor, k: Tensor, tile: Blocks) -> dict[str, Any]:
    interpreted = _interpreted()
    fixed: dict[str, Any] = {
        "G": q.shape[1] // k.shape[1],
        "D": q.shape[3],
        "BM": tile.queries,
        "BN": tile.keys,
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    return fixed if interpreted else fixed | {"num_warps": tile.warps, "num_stages": tile.stages}
