"""Triton kernels of prefix attention: a few queries a sample over keys of which all are visible to all of them.

Imported only by `split.py` of this folder, when it first runs on a GPU. The forward goes on with the online softmax of
what those queries saw before; the backward adds onto gradients. Every element is written by one program, so that the
same bits come out on every run.

Legend: SPANS (K, 4) int32, tokens of queries [0, 1) and of keys [2, 3). The queries of all G heads of a key head are
rows of one tile: row r is token r // G, head r % G of the group. BM rows and BN keys a tile; D head size. LSE is a
natural logarithm, (heads, tokens); inside, scores are in base 2. Strides are of tokens (t) and heads (h); D is dense.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b in fp32. UPCAST: the interpreter's bf16 product is garbage."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _forward_tile(
    acc,
    top,
    total,
    q,
    k_ptrs,
    v_ptrs,
    alive,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of keys: online softmax in base 2. `top` running maximum, `total` running sum, (BM,) fp32."""
    if MASKED:
        k = tl.load(k_ptrs, mask=alive[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=alive[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    scores = _dot(q, k, tl.zeros([BM, BN], tl.float32), UPCAST) * scale
    if MASKED:
        scores = tl.where(alive[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], UPCAST)
    return acc, higher, total


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    SPANS,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    tokens,
    sm_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (row tiles, key heads, ranges). OUT and LSE of the rows are read, merged with the keys, and written."""
    span = SPANS + tl.program_id(2) * 4
    first_query = tl.load(span)
    rows_here = (tl.load(span + 1) - first_query) * G
    first_key = tl.load(span + 2)
    last_key = tl.load(span + 3)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM < rows_here:
        kv_head = tl.program_id(1).to(tl.int64)
        token = (first_query + row // G).to(tl.int64)
        head = kv_head * G + row % G
        good = row < rows_here
        dims = tl.arange(0, D)
        keys = tl.arange(0, BN)
        q = tl.load(Q + (token * stride_qt + head * stride_qh)[:, None] + dims[None, :], mask=good[:, None], other=0.0)
        out_ptrs = OUT + (token * stride_ot + head * stride_oh)[:, None] + dims[None, :]
        lse_ptrs = LSE + head * tokens + token
        acc = tl.load(out_ptrs, mask=good[:, None], other=0.0).to(tl.float32)
        top = tl.load(lse_ptrs, mask=good, other=0.0) * LOG2E
        total = tl.full([BM], 1.0, tl.float32)
        k_base = K + kv_head * stride_kh + dims[:, None]
        v_base = V + kv_head * stride_vh + dims[None, :]
        scale = sm_scale * LOG2E
        whole = first_key + (last_key - first_key) // BN * BN
        for start in range(first_key, whole, BN):
            at = (start + keys).to(tl.int64)
            acc, top, total = _forward_tile(
                acc,
                top,
                total,
                q,
                k_base + at[None, :] * stride_kt,
                v_base + at[:, None] * stride_vt,
                good,
                scale,
                BM,
                BN,
                False,
                UPCAST,
            )
        if whole < last_key:
            at = (whole + keys).to(tl.int64)
            acc, top, total = _forward_tile(
                acc,
                top,
                total,
                q,
                k_base + at[None, :] * stride_kt,
                v_base + at[:, None] * stride_vt,
                at < last_key,
                scale,
                BM,
                BN,
                True,
                UPCAST,
            )
        tl.store(out_ptrs, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=good[:, None])
        tl.store(lse_ptrs, (top + tl.log2(total)) / LOG2E, mask=good)


@triton.jit
def _dq_tile(
    dq,
    q,
    do,
    lse,
    delta,
    k_ptrs,
    v_ptrs,
    alive,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of keys against the program's rows. Keys that are not alive are 0, and add 0."""
    if MASKED:
        k = tl.load(k_ptrs, mask=alive[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=alive[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    scores = _dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST) * scale
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:  # a score of 0 may be far above lse: inf * 0
        weights = tl.where(alive[None, :], weights, 0.0)
    dweights = _dot(do, tl.trans(v), tl.zeros([BM, BN], tl.float32), UPCAST)
    return _dot((weights * (dweights - delta[:, None])).to(k.dtype), k, dq, UPCAST)


@triton.jit
def dq_kernel(
    Q,
    K,
    V,
    OUT,
    DOUT,
    LSE,
    DELTA,
    SPANS,
    DQ,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_dt,
    stride_dh,
    stride_dqt,
    stride_dqh,
    tokens,
    sm_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (row tiles, key heads, ranges). Adds onto DQ of the rows; writes DELTA (heads, tokens) fp32 of them, the
    sum over D of OUT * DOUT."""
    span = SPANS + tl.program_id(2) * 4
    first_query = tl.load(span)
    rows_here = (tl.load(span + 1) - first_query) * G
    first_key = tl.load(span + 2)
    last_key = tl.load(span + 3)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM < rows_here:
        kv_head = tl.program_id(1).to(tl.int64)
        token = (first_query + row // G).to(tl.int64)
        head = kv_head * G + row % G
        good = row < rows_here
        dims = tl.arange(0, D)
        keys = tl.arange(0, BN)
        q = tl.load(Q + (token * stride_qt + head * stride_qh)[:, None] + dims[None, :], mask=good[:, None], other=0.0)
        do_ptrs = DOUT + (token * stride_dt + head * stride_dh)[:, None] + dims[None, :]
        do = tl.load(do_ptrs, mask=good[:, None], other=0.0)
        out_ptrs = OUT + (token * stride_ot + head * stride_oh)[:, None] + dims[None, :]
        out = tl.load(out_ptrs, mask=good[:, None], other=0.0)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(DELTA + head * tokens + token, delta, mask=good)
        lse = tl.load(LSE + head * tokens + token, mask=good, other=0.0) * LOG2E
        k_base = K + kv_head * stride_kh + dims[None, :]
        v_base = V + kv_head * stride_vh + dims[None, :]
        scale = sm_scale * LOG2E
        dq = tl.zeros([BM, D], tl.float32)
        whole = first_key + (last_key - first_key) // BN * BN
        for start in range(first_key, whole, BN):
            at = (start + keys).to(tl.int64)
            dq = _dq_tile(
                dq,
                q,
                do,
                lse,
                delta,
                k_base + at[:, None] * stride_kt,
                v_base + at[:, None] * stride_vt,
                good,
                scale,
                BM,
                BN,
                False,
                UPCAST,
            )
        if whole < last_key:
            at = (whole + keys).to(tl.int64)
            dq = _dq_tile(
                dq,
                q,
                do,
                lse,
                delta,
                k_base + at[:, None] * stride_kt,
                v_base + at[:, None] * stride_vt,
                at < last_key,
                scale,
                BM,
                BN,
                True,
                UPCAST,
            )
        dq_ptrs = DQ + (token * stride_dqt + head * stride_dqh)[:, None] + dims[None, :]
        dq = dq * sm_scale + tl.load(dq_ptrs, mask=good[:, None], other=0.0).to(tl.float32)
        tl.store(dq_ptrs, dq.to(DQ.dtype.element_ty), mask=good[:, None])


@triton.jit
def dkdv_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    SPANS,
    DK,
    DV,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    tokens,
    sm_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (key tiles, key heads, ranges). Adds onto DK and DV of the keys. Scores are transposed, (BN, BM)."""
    span = SPANS + tl.program_id(2) * 4
    first_query = tl.load(span)
    rows_here = (tl.load(span + 1) - first_query) * G
    last_key = tl.load(span + 3)
    first_key = tl.load(span + 2) + tl.program_id(0) * BN
    if first_key < last_key:
        kv_head = tl.program_id(1).to(tl.int64)
        at = (first_key + tl.arange(0, BN)).to(tl.int64)
        alive = at < last_key
        dims = tl.arange(0, D)
        k_ptrs = K + kv_head * stride_kh + at[:, None] * stride_kt + dims[None, :]
        v_ptrs = V + kv_head * stride_vh + at[:, None] * stride_vt + dims[None, :]
        k = tl.load(k_ptrs, mask=alive[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=alive[:, None], other=0.0)
        scale = sm_scale * LOG2E
        dk = tl.zeros([BN, D], tl.float32)
        dv = tl.zeros([BN, D], tl.float32)
        for start in range(0, rows_here, BM):
            row = start + tl.arange(0, BM)
            token = (first_query + row // G).to(tl.int64)
            head = kv_head * G + row % G
            good = row < rows_here
            lse = tl.load(LSE + head * tokens + token, mask=good, other=float("inf")) * LOG2E  # inf: weight 0
            delta = tl.load(DELTA + head * tokens + token, mask=good, other=0.0)
            q_ptrs = Q + (token * stride_qt + head * stride_qh)[:, None] + dims[None, :]
            do_ptrs = DOUT + (token * stride_dt + head * stride_dh)[:, None] + dims[None, :]
            q = tl.load(q_ptrs, mask=good[:, None], other=0.0)
            do = tl.load(do_ptrs, mask=good[:, None], other=0.0)
            scores = _dot(k, tl.trans(q), tl.zeros([BN, BM], tl.float32), UPCAST) * scale
            weights = tl.exp2(scores - lse[None, :])
            dv = _dot(weights.to(do.dtype), do, dv, UPCAST)
            dweights = _dot(v, tl.trans(do), tl.zeros([BN, BM], tl.float32), UPCAST)
            dk = _dot((weights * (dweights - delta[None, :])).to(q.dtype), q, dk, UPCAST)
        dk_ptrs = DK + kv_head * stride_dkh + at[:, None] * stride_dkt + dims[None, :]
        dv_ptrs = DV + kv_head * stride_dvh + at[:, None] * stride_dvt + dims[None, :]
        dk = dk * sm_scale + tl.load(dk_ptrs, mask=alive[:, None], other=0.0).to(tl.float32)
        dv = dv + tl.load(dv_ptrs, mask=alive[:, None], other=0.0).to(tl.float32)
        tl.store(dk_ptrs, dk.to(DK.dtype.element_ty), mask=alive[:, None])
        tl.store(dv_ptrs, dv.to(DV.dtype.element_ty), mask=alive[:, None])
