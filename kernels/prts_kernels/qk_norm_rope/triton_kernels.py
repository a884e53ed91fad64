"""Triton kernels of norm and rotation: an element is read once and written once; no atomics, the same bits every run.

Imported only by `triton.py` of this folder, when it is first used.

Legend: a program takes BT tokens and HB heads, one head at a time; cos, sin and the weight stay in registers meanwhile,
and the next head is under way while one is computed (stores would hold back later loads: pointers may alias).
H heads, D head size; the row of a head is handled as its two halves (first, second), which rotation mixes. All
arithmetic is in fp32. The partial weight gradients of each program lie in a row of their own, summed afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(ptr, tokens, stride, real, D: tl.constexpr):
    """Both halves, (BT, D / 2) as they lie in memory, of the rows of D that start at ptr + tokens * stride."""
    dims = tl.arange(0, D // 2)
    at = ptr + tokens[:, None] * stride + dims[None, :]
    first = tl.load(at, mask=real[:, None], other=0.0)
    second = tl.load(at + D // 2, mask=real[:, None], other=0.0)
    return first, second


@triton.jit
def _store(ptr, tokens, stride, real, first, second, D: tl.constexpr):
    dims = tl.arange(0, D // 2)
    at = ptr + tokens[:, None] * stride + dims[None, :]
    tl.store(at, first.to(ptr.dtype.element_ty), mask=real[:, None])
    tl.store(at + D // 2, second.to(ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def forward_kernel(
    X, WEIGHT, COS, SIN, OUT, stride_xt, stride_xh, stride_ct, stride_st, length, eps,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    real = tokens < length
    tokens = tokens.to(tl.int64)
    dims = tl.arange(0, D // 2)
    w1 = tl.load(WEIGHT + dims).to(tl.float32)[None, :]
    w2 = tl.load(WEIGHT + D // 2 + dims).to(tl.float32)[None, :]
    c1, c2 = _halves(COS, tokens, stride_ct, real, D)
    s1, s2 = _halves(SIN, tokens, stride_st, real, D)
    head = tl.program_id(1) * HB
    next1, next2 = _halves(X + head * stride_xh, tokens, stride_xt, real, D)
    for i in range(HB):
        x1 = next1.to(tl.float32)
        x2 = next2.to(tl.float32)
        next1, next2 = _halves(X + (head + 1) * stride_xh, tokens, stride_xt, real & (i + 1 < HB), D)
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        y1 = x1 * scale * w1
        y2 = x2 * scale * w2
        _store(OUT + head * D, tokens, H * D, real, y1 * c1 - y2 * s1, y2 * c2 + y1 * s2, D)
        head += 1


@triton.jit
def backward_kernel(
    X, WEIGHT, COS, SIN, DOUT, DX, DWEIGHT,
    stride_xt, stride_xh, stride_ct, stride_st, stride_gt, stride_gh, length, eps,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    real = tokens < length
    tokens = tokens.to(tl.int64)
    dims = tl.arange(0, D // 2)
    w1 = tl.load(WEIGHT + dims).to(tl.float32)[None, :]
    w2 = tl.load(WEIGHT + D // 2 + dims).to(tl.float32)[None, :]
    c1, c2 = _halves(COS, tokens, stride_ct, real, D)
    s1, s2 = _halves(SIN, tokens, stride_st, real, D)
    dw1 = tl.zeros([BT, D // 2], tl.float32)
    dw2 = tl.zeros([BT, D // 2], tl.float32)
    head = tl.program_id(1) * HB
    next_x1, next_x2 = _halves(X + head * stride_xh, tokens, stride_xt, real, D)
    next_g1, next_g2 = _halves(DOUT + head * stride_gh, tokens, stride_gt, real, D)
    for i in range(HB):
        x1 = next_x1.to(tl.float32)
        x2 = next_x2.to(tl.float32)
        g1 = next_g1.to(tl.float32)
        g2 = next_g2.to(tl.float32)
        more = real & (i + 1 < HB)
        next_x1, next_x2 = _halves(X + (head + 1) * stride_xh, tokens, stride_xt, more, D)
        next_g1, next_g2 = _halves(DOUT + (head + 1) * stride_gh, tokens, stride_gt, more, D)
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        x1 *= scale
        x2 *= scale
        dy1 = g1 * c1 + g2 * s2
        dy2 = g2 * c2 - g1 * s1
        dw1 += dy1 * x1
        dw2 += dy2 * x2
        dy1 *= w1
        dy2 *= w2
        along = ((tl.sum(dy1 * x1, 1) + tl.sum(dy2 * x2, 1)) / D)[:, None]
        _store(DX + head * D, tokens, H * D, real, scale * (dy1 - x1 * along), scale * (dy2 - x2 * along), D)
        head += 1
    row = DWEIGHT + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * D
    tl.store(row + dims, tl.sum(dw1, 0))
    tl.store(row + D // 2 + dims, tl.sum(dw2, 0))
