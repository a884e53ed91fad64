"""Triton kernels of role-aware attention: forward, and a backward without atomics (bitwise repeatable).

Imported only by `triton.py` of this folder, when it is first used. They do not know the role table: of the mask they
see key_end, its min and max over tiles of keys, and the lists of tiles to visit (`mask.py`).

Legend: BM, BN queries and keys a tile; D head size; G query heads a key head; scores are in base 2 (LOG2E folded into
their scale), so are the log-sum-exps, +inf for queries that see no key. Tiles in a `whole` list or range need no mask;
only the others load key_end, and they alone wipe what lies in dead keys and blind rows, NaN included.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b in fp32. UPCAST: the interpreter's bf16 product is garbage."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _forward_tile(
    acc, top, total, q, rows, tile, k_base, v_base, end_base, stride_kl, stride_vl, scale, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: online softmax in base 2. `top` running maximum, `total` running sum, (BM,) fp32."""
    keys = tile * BN + tl.arange(0, BN)
    dims = tl.arange(0, D)
    k_ptrs = k_base + keys[None, :] * stride_kl + dims[:, None]
    v_ptrs = v_base + keys[:, None] * stride_vl + dims[None, :]
    if MASKED:
        ends = tl.load(end_base + keys, mask=keys < length, other=0)
        alive = ends > keys
        k = tl.load(k_ptrs, mask=alive[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=alive[:, None], other=0.0)
        scores = _dot(q, k, tl.zeros([BM, BN], tl.float32), UPCAST, PRECISION) * scale
        visible = (keys[None, :] <= rows[:, None]) & (rows[:, None] < ends[None, :])
        scores = tl.where(visible, scores, float("-inf"))
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
        scores = _dot(q, k, tl.zeros([BM, BN], tl.float32), UPCAST, PRECISION) * scale
    higher = tl.maximum(top, tl.max(scores, 1))
    if MASKED:
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen nothing yet
    else:
        finite = higher
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(top - finite)
    total = total * shrink + tl.sum(weights, 1)
    acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], UPCAST, PRECISION)
    return acc, higher, total


@triton.jit
def forward_kernel(
    Q, K, V, KEY_END, WHOLE, N_WHOLE, PART, N_PART, OUT, LSE,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, heads, length, query_tiles, key_tiles, scale,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * heads). Writes OUT and LSE (B, heads, length) fp32."""
    tile = query_tiles - 1 - tl.program_id(0)  # the longest rows first: no tail of late long ones
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    inside = rows < length
    q_ptrs = Q + batch * stride_qb + head * stride_qh + rows[:, None] * stride_ql + dims[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
    k_base = K + batch * stride_kb + (head // G) * stride_kh
    v_base = V + batch * stride_vb + (head // G) * stride_vh
    end_base = KEY_END + batch * length
    visit = batch * query_tiles + tile

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n in range(0, tl.load(N_WHOLE + visit)):
        acc, top, total = _forward_tile(
            acc, top, total, q, rows, tl.load(WHOLE + visit * key_tiles + n), k_base, v_base, end_base,
            stride_kl, stride_vl, scale, length, D, BM, BN, False, UPCAST, PRECISION,
        )  # fmt: skip
    for n in range(0, tl.load(N_PART + visit)):
        acc, top, total = _forward_tile(
            acc, top, total, q, rows, tl.load(PART + visit * key_tiles + n), k_base, v_base, end_base,
            stride_kl, stride_vl, scale, length, D, BM, BN, True, UPCAST, PRECISION,
        )  # fmt: skip

    blind = total == 0.0
    safe = tl.where(blind, 1.0, total)
    out = acc / safe[:, None]
    lse = tl.where(blind, float("inf"), top + tl.log2(safe))
    out_ptrs = OUT + batch * stride_ob + head * stride_oh + rows[:, None] * stride_ol + dims[None, :]
    tl.store(out_ptrs, out.to(OUT.dtype.element_ty), mask=inside[:, None])
    tl.store(LSE + (batch * heads + head) * length + rows, lse, mask=inside)


@triton.jit
def delta_kernel(
    OUT, DOUT, LSE, DELTA, stride_ob, stride_oh, stride_ol, stride_db, stride_dh, stride_dl, heads, length,
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * heads). DELTA (B, heads, length) fp32 = sum over D of OUT * DOUT; 0 for blind queries."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    flat = (batch * heads + head) * length + rows
    sees = tl.load(LSE + flat, mask=rows < length, other=float("inf")) < float("inf")
    o_ptrs = OUT + batch * stride_ob + head * stride_oh + rows[:, None] * stride_ol + dims[None, :]
    d_ptrs = DOUT + batch * stride_db + head * stride_dh + rows[:, None] * stride_dl + dims[None, :]
    out = tl.load(o_ptrs, mask=sees[:, None], other=0.0).to(tl.float32)
    dout = tl.load(d_ptrs, mask=sees[:, None], other=0.0).to(tl.float32)
    tl.store(DELTA + flat, tl.sum(out * dout, 1), mask=rows < length)


@triton.jit
def _dkdv_tile(
    dk, dv, k, v, keys, ends, tile, q_base, do_base, lse_base, delta_base, stride_ql, stride_dl, scale, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries against the program's keys. Scores are transposed, (BN, BM)."""
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    lse = tl.load(lse_base + rows, mask=rows < length, other=float("inf"))
    delta = tl.load(delta_base + rows, mask=rows < length, other=0.0)
    good = rows < length
    if MASKED:
        good = lse < float("inf")
    q = tl.load(q_base + rows[:, None] * stride_ql + dims[None, :], mask=good[:, None], other=0.0)
    do = tl.load(do_base + rows[:, None] * stride_dl + dims[None, :], mask=good[:, None], other=0.0)
    scores = _dot(k, tl.trans(q), tl.zeros([BN, BM], tl.float32), UPCAST, PRECISION) * scale
    weights = tl.exp2(scores - lse[None, :])
    if MASKED:
        visible = (keys[:, None] <= rows[None, :]) & (rows[None, :] < ends[:, None])
        weights = tl.where(visible, weights, 0.0)
    dv = _dot(weights.to(do.dtype), do, dv, UPCAST, PRECISION)
    dweights = _dot(v, tl.trans(do), tl.zeros([BN, BM], tl.float32), UPCAST, PRECISION)
    dscores = weights * (dweights - delta[None, :])
    dk = _dot(dscores.to(q.dtype), q, dk, UPCAST, PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, KEY_END, TILE_MIN, TILE_MAX, DK, DV,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_db, stride_dh, stride_dl, heads, length, query_tiles, key_tiles, scale, sm_scale,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles, B * key heads). Writes DK, DV (B, key heads, length, D), contiguous.

    The queries that see some key of a tile are one range [tile's first key, max key_end): masked at both of its ends
    (diagonal, holes), whole between them.
    """
    tile = tl.program_id(0)
    kv_heads = heads // G
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    keys = tile * BN + tl.arange(0, BN)
    dims = tl.arange(0, D)
    inside = keys < length
    ends = tl.load(KEY_END + batch * length + keys, mask=inside, other=0)
    alive = ends > keys
    k_ptrs = K + batch * stride_kb + kv_head * stride_kh + keys[:, None] * stride_kl + dims[None, :]
    v_ptrs = V + batch * stride_vb + kv_head * stride_vh + keys[:, None] * stride_vl + dims[None, :]
    k = tl.load(k_ptrs, mask=alive[:, None], other=0.0)
    v = tl.load(v_ptrs, mask=alive[:, None], other=0.0)

    low = tl.load(TILE_MIN + batch * key_tiles + tile)
    last = tl.cdiv(tl.load(TILE_MAX + batch * key_tiles + tile), BM)
    first = tile * BN // BM
    whole_start = tl.minimum(tl.cdiv(tile * BN + BN - 1, BM), last)
    whole_end = tl.where(low >= length, query_tiles, low // BM)
    whole_end = tl.maximum(tl.minimum(whole_end, last), whole_start)

    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for g in range(0, G):
        head = kv_head * G + g
        q_base = Q + batch * stride_qb + head * stride_qh
        do_base = DOUT + batch * stride_db + head * stride_dh
        lse_base = LSE + (batch * heads + head) * length
        delta_base = DELTA + (batch * heads + head) * length
        for m in range(first, whole_start):
            dk, dv = _dkdv_tile(
                dk, dv, k, v, keys, ends, m, q_base, do_base, lse_base, delta_base, stride_ql, stride_dl, scale, length,
                D, BM, BN, True, UPCAST, PRECISION,
            )  # fmt: skip
        for m in range(whole_start, whole_end):
            dk, dv = _dkdv_tile(
                dk, dv, k, v, keys, ends, m, q_base, do_base, lse_base, delta_base, stride_ql, stride_dl, scale, length,
                D, BM, BN, False, UPCAST, PRECISION,
            )  # fmt: skip
        for m in range(whole_end, last):
            dk, dv = _dkdv_tile(
                dk, dv, k, v, keys, ends, m, q_base, do_base, lse_base, delta_base, stride_ql, stride_dl, scale, length,
                D, BM, BN, True, UPCAST, PRECISION,
            )  # fmt: skip
    flat = ((batch * kv_heads + kv_head) * length + keys[:, None]) * D + dims[None, :]
    tl.store(DK + flat, (dk * sm_scale).to(DK.dtype.element_ty), mask=inside[:, None])
    tl.store(DV + flat, dv.to(DV.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dq_tile(
    dq, q, do, lse, delta, rows, tile, k_base, v_base, end_base, stride_kl, stride_vl, scale, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys against the program's queries."""
    keys = tile * BN + tl.arange(0, BN)
    dims = tl.arange(0, D)
    k_ptrs = k_base + keys[:, None] * stride_kl + dims[None, :]
    v_ptrs = v_base + keys[:, None] * stride_vl + dims[None, :]
    if MASKED:
        ends = tl.load(end_base + keys, mask=keys < length, other=0)
        alive = ends > keys
        k = tl.load(k_ptrs, mask=alive[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=alive[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    scores = _dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST, PRECISION) * scale
    weights = tl.exp2(scores - lse[:, None])
    dweights = _dot(do, tl.trans(v), tl.zeros([BM, BN], tl.float32), UPCAST, PRECISION)
    dscores = weights * (dweights - delta[:, None])
    if MASKED:
        visible = (keys[None, :] <= rows[:, None]) & (rows[:, None] < ends[None, :])
        dscores = tl.where(visible, dscores, 0.0)
    return _dot(dscores.to(k.dtype), k, dq, UPCAST, PRECISION)


@triton.jit
def dq_kernel(
    Q, K, V, DOUT, LSE, DELTA, KEY_END, WHOLE, N_WHOLE, PART, N_PART, DQ,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_db, stride_dh, stride_dl, heads, length, query_tiles, key_tiles, scale, sm_scale,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * heads). Writes DQ (B, heads, length, D), contiguous; visits what the forward visits."""
    tile = query_tiles - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    inside = rows < length
    flat = (batch * heads + head) * length + rows
    lse = tl.load(LSE + flat, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + flat, mask=inside, other=0.0)
    q_ptrs = Q + batch * stride_qb + head * stride_qh + rows[:, None] * stride_ql + dims[None, :]
    d_ptrs = DOUT + batch * stride_db + head * stride_dh + rows[:, None] * stride_dl + dims[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
    do = tl.load(d_ptrs, mask=inside[:, None], other=0.0)
    k_base = K + batch * stride_kb + (head // G) * stride_kh
    v_base = V + batch * stride_vb + (head // G) * stride_vh
    end_base = KEY_END + batch * length
    visit = batch * query_tiles + tile

    dq = tl.zeros([BM, D], tl.float32)
    for n in range(0, tl.load(N_WHOLE + visit)):
        dq = _dq_tile(
            dq, q, do, lse, delta, rows, tl.load(WHOLE + visit * key_tiles + n), k_base, v_base, end_base,
            stride_kl, stride_vl, scale, length, D, BM, BN, False, UPCAST, PRECISION,
        )  # fmt: skip
    for n in range(0, tl.load(N_PART + visit)):
        dq = _dq_tile(
            dq, q, do, lse, delta, rows, tl.load(PART + visit * key_tiles + n), k_base, v_base, end_base,
            stride_kl, stride_vl, scale, length, D, BM, BN, True, UPCAST, PRECISION,
        )  # fmt: skip
    tl.store(DQ + flat[:, None] * D + dims[None, :], (dq * sm_scale).to(DQ.dtype.element_ty), mask=inside[:, None])
