"""Triton kernels of role-aware attention: forward, and a backward without atomics (bitwise repeatable).

Imported only by `triton.py` of this folder, when it is first used. Of the mask they see one list of tiles (`tiles.py`):
where a tile begins and the five numbers of its sample.

Legend: BM rows of queries a tile: TOKENS tokens times the G query heads of one key head, token by token, so that one
load of K and V serves all G and the diagonal wastes TOKENS, not BM (rows beyond TOKENS * G idle). BN keys a tile; D
head size; at, stop: a tile's first token and the one behind its last. Scores are in base 2 (log2 e is folded into
`scale`), so are the log-sum-exps LSE (key heads, T, G) fp32, +inf for queries that see no key. Tiles seen whole need no
mask and come first; the masked ones follow in one loop whose counter gives their place by arithmetic, so that loads run
ahead.
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
def _key_tiles(at, stop, start, observation, bc, crl, BN: tl.constexpr):
    """The keys that queries [at, stop) see, as tiles: `near` of them from `first` on, `whole` of those without a mask,
    then, if some of the queries are of a CRL action, tiles from bc on. Returns first, whole, near, all (counts).

    A tile that begins in the CRL action sees nothing of [observation, bc), whatever else is in it; a goal sees itself.
    """
    mixed = (at < crl) & (stop > bc)
    first = tl.where(at >= crl, crl, start)
    near_end = tl.where(mixed, tl.where(at >= bc, observation, bc), stop)
    near = tl.maximum(near_end - first + BN - 1, 0) // BN
    far = tl.where(mixed, (stop - bc + BN - 1) // BN, 0)
    # Whole: up to the diagonal, up to the hole if one of the queries has it, nothing if only some are a goal's.
    whole_end = tl.where(mixed, tl.minimum(at + 1, observation), at + 1)
    whole_end = tl.where((stop > crl) & (at < crl), first, whole_end)
    whole = tl.maximum(whole_end - first, 0) // BN
    return first, whole, near, near + far


@triton.jit
def _seen_keys(tokens, at, observation, bc, crl):
    """Each query sees one run of the near keys, up to `near_until`, and one of the far keys, from `far_from` up to
    itself; (near_until, far_from), exclusive and inclusive."""
    near_until = tl.where(tokens < bc, tokens + 1, tl.where(tokens < crl, observation, 0))
    near_until = tl.where(at >= crl, tokens + 1, near_until)
    far_from = tl.where(tokens < crl, bc, crl)
    return near_until, far_from


@triton.jit
def _visible(tokens, near_until, far_from, key, is_near, BN: tl.constexpr):
    """(BM, BN), keys from `key` on: one unsigned comparison a score, keys - low < many."""
    low = tl.where(is_near, 0, far_from)
    many = tl.maximum(tl.where(is_near, near_until, tokens + 1) - low, 0)
    beyond = tl.arange(0, BN)[None, :] + (key - low)[:, None]
    return beyond.to(tl.uint32) < many.to(tl.uint32)[:, None]


@triton.jit
def _query_range(at, stop, start, observation, bc, crl, goal):
    """Queries that see keys [at, stop): (until, whole_until); all from stop - 1 to whole_until see all the keys."""
    has_hole = (at < bc) & (stop > observation)  # keys of the instruction, the prompt, the autoregressive action
    until = tl.where((at < observation) | (stop > bc), crl, bc)
    until = tl.where(stop > crl, goal, until)
    whole_until = tl.where(has_hole, bc, tl.where(at < crl, crl, goal))
    padding = start > at
    return tl.where(padding, at, until), whole_until


@triton.jit
def _ends(keys, observation, bc, crl, goal):
    """key_end of keys of one sample."""
    return tl.where((keys >= observation) & (keys < bc), bc, tl.where(keys < crl, crl, goal))


@triton.jit
def _forward_tile(
    acc,
    top,
    total,
    q,
    tokens,
    near_until,
    far_from,
    key,
    is_near,
    stop,
    k_base,
    v_base,
    stride_kt,
    stride_vt,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys from `key` on: online softmax in base 2. `top` running maximum before scaling, `total` running sum."""
    columns = tl.arange(0, BN)
    dims = tl.arange(0, D)
    k_ptrs = k_base + key.to(tl.int64) * stride_kt + (columns[None, :] * stride_kt + dims[:, None])
    v_ptrs = v_base + key.to(tl.int64) * stride_vt + (columns[:, None] * stride_vt + dims[None, :])
    if MASKED:
        k = tl.load(k_ptrs, mask=(key + columns < stop)[None, :], other=0.0)
    else:
        k = tl.load(k_ptrs)
    scores = _dot(q, k, tl.zeros([BM, BN], tl.float32), UPCAST, PRECISION)
    if MASKED:
        scores = tl.where(_visible(tokens, near_until, far_from, key, is_near, BN), scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    if MASKED:
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen nothing yet
    else:
        finite = higher
    weights = tl.exp2(scores * scale - (finite * scale)[:, None])  # one fused multiply-add a score
    shrink = tl.exp2((top - finite) * scale)
    total = total * shrink + tl.sum(weights, 1)
    if MASKED:
        v = tl.load(v_ptrs, mask=(key + columns < stop)[:, None], other=0.0)
    else:
        v = tl.load(v_ptrs)
    acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], UPCAST, PRECISION)
    return acc, higher, total


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    TILES,
    OUT,
    LSE,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    total_tokens,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, key heads). Writes OUT (T, heads, D), contiguous, and LSE."""
    at, start, observation, bc, crl, goal = _tile(TILES)
    stop = tl.minimum(at + TOKENS, goal)
    kv_head = tl.program_id(1)
    row = tl.arange(0, BM)
    dims = tl.arange(0, D)
    tokens = at + row // G
    inside = (tokens < stop) & (row < TOKENS * G)
    q_ptrs = _rows(Q, at, kv_head, row, stride_qt, stride_qh, G)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
    k_base = K + kv_head.to(tl.int64) * stride_kh
    v_base = V + kv_head.to(tl.int64) * stride_vh
    near_until, far_from = _seen_keys(tokens, at, observation, bc, crl)
    first, whole, near, visits = _key_tiles(at, stop, start, observation, bc, crl, BN)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n in range(0, whole):
        acc, top, total = _forward_tile(
            acc,
            top,
            total,
            q,
            tokens,
            near_until,
            far_from,
            first + n * BN,
            True,
            stop,
            k_base,
            v_base,
            stride_kt,
            stride_vt,
            scale,
            D,
            BM,
            BN,
            False,
            UPCAST,
            PRECISION,
        )
    for n in range(whole, visits):
        key = tl.where(n < near, first + n * BN, bc + (n - near) * BN)
        acc, top, total = _forward_tile(
            acc,
            top,
            total,
            q,
            tokens,
            near_until,
            far_from,
            key,
            n < near,
            stop,
            k_base,
            v_base,
            stride_kt,
            stride_vt,
            scale,
            D,
            BM,
            BN,
            True,
            UPCAST,
            PRECISION,
        )

    fully_masked = total == 0.0
    safe = tl.where(fully_masked, 1.0, total)
    out = acc * (1.0 / safe)[:, None]
    lse = tl.where(fully_masked, float("inf"), top * scale + tl.log2(safe))
    heads = tl.num_programs(1) * G
    out_ptrs = _rows(OUT, at, kv_head, row, heads * D, D, G)[:, None] + dims[None, :]
    tl.store(out_ptrs, out.to(OUT.dtype.element_ty), mask=inside[:, None])
    tl.store(_flat(LSE, at, kv_head, total_tokens, G) + row, lse, mask=inside)


@triton.jit
def _tile(TILES):
    """One row of the list, for this program."""
    row = TILES + tl.program_id(0) * 6
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)


@triton.jit
def _rows(X, at, kv_head, row, stride_t, stride_h, G: tl.constexpr):
    """(BM,) pointers to the rows of a tile: token at + row // G, query head kv_head * G + row % G."""
    base = X + at.to(tl.int64) * stride_t + (kv_head * G).to(tl.int64) * stride_h
    return base + ((row // G) * stride_t + (row % G) * stride_h)


@triton.jit
def _flat(X, at, kv_head, total_tokens, G: tl.constexpr):
    """Where a tile's rows begin in (key heads, T, G)."""
    return X + (kv_head.to(tl.int64) * total_tokens + at) * G


@triton.jit
def _dq_tile(
    dq,
    q,
    do,
    lse,
    delta,
    tokens,
    near_until,
    far_from,
    key,
    is_near,
    stop,
    k_base,
    v_base,
    stride_kt,
    stride_vt,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys from `key` on against the program's queries."""
    columns = tl.arange(0, BN)
    dims = tl.arange(0, D)
    k_ptrs = k_base + key.to(tl.int64) * stride_kt + (columns[:, None] * stride_kt + dims[None, :])
    v_ptrs = v_base + key.to(tl.int64) * stride_vt + (columns[:, None] * stride_vt + dims[None, :])
    if MASKED:
        k = tl.load(k_ptrs, mask=(key + columns < stop)[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=(key + columns < stop)[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    scores = _dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), UPCAST, PRECISION)
    dweights = _dot(do, tl.trans(v), tl.zeros([BM, BN], tl.float32), UPCAST, PRECISION)
    if MASKED:
        scores = tl.where(_visible(tokens, near_until, far_from, key, is_near, BN), scores, float("-inf"))
    weights = tl.exp2(scores * scale - lse[:, None])
    dscores = weights * (dweights - delta[:, None])
    return _dot(dscores.to(k.dtype), k, dq, UPCAST, PRECISION)


@triton.jit
def dq_kernel(
    Q,
    K,
    V,
    OUT,
    DOUT,
    LSE,
    TILES,
    DELTA,
    DQ,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    total_tokens,
    scale,
    sm_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, key heads); runs before `dkdv_kernel`. Visits what the forward visits.

    Writes DQ (T, heads, D), contiguous, and DELTA, laid out as LSE: the sum over D of OUT * DOUT, 0 for fully masked
    queries.
    """
    at, start, observation, bc, crl, goal = _tile(TILES)
    stop = tl.minimum(at + TOKENS, goal)
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * G
    row = tl.arange(0, BM)
    dims = tl.arange(0, D)
    tokens = at + row // G
    inside = (tokens < stop) & (row < TOKENS * G)
    sees = inside & (start <= at)  # what lies in padding, NaN too, is no one's business
    q_ptrs = _rows(Q, at, kv_head, row, stride_qt, stride_qh, G)[:, None] + dims[None, :]
    d_ptrs = _rows(DOUT, at, kv_head, row, stride_dt, stride_dh, G)[:, None] + dims[None, :]
    o_ptrs = _rows(OUT, at, kv_head, row, heads * D, D, G)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=sees[:, None], other=0.0)
    do = tl.load(d_ptrs, mask=sees[:, None], other=0.0)
    out = tl.load(o_ptrs, mask=sees[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(_flat(DELTA, at, kv_head, total_tokens, G) + row, delta, mask=inside)
    lse = tl.load(_flat(LSE, at, kv_head, total_tokens, G) + row, mask=inside, other=float("inf"))
    k_base = K + kv_head.to(tl.int64) * stride_kh
    v_base = V + kv_head.to(tl.int64) * stride_vh
    near_until, far_from = _seen_keys(tokens, at, observation, bc, crl)
    first, whole, near, visits = _key_tiles(at, stop, start, observation, bc, crl, BN)

    dq = tl.zeros([BM, D], tl.float32)
    for n in range(0, whole):
        dq = _dq_tile(
            dq,
            q,
            do,
            lse,
            delta,
            tokens,
            near_until,
            far_from,
            first + n * BN,
            True,
            stop,
            k_base,
            v_base,
            stride_kt,
            stride_vt,
            scale,
            D,
            BM,
            BN,
            False,
            UPCAST,
            PRECISION,
        )
    for n in range(whole, visits):
        key = tl.where(n < near, first + n * BN, bc + (n - near) * BN)
        dq = _dq_tile(
            dq,
            q,
            do,
            lse,
            delta,
            tokens,
            near_until,
            far_from,
            key,
            n < near,
            stop,
            k_base,
            v_base,
            stride_kt,
            stride_vt,
            scale,
            D,
            BM,
            BN,
            True,
            UPCAST,
            PRECISION,
        )
    dq_ptrs = _rows(DQ, at, kv_head, row, heads * D, D, G)[:, None] + dims[None, :]
    tl.store(dq_ptrs, (dq * sm_scale).to(DQ.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dkdv_tile(
    dk,
    dv,
    k,
    v,
    keys,
    ends,
    token,
    goal,
    q_base,
    do_base,
    lse_base,
    delta_base,
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries from `token` on against the program's keys. Scores are transposed, (BN, BM)."""
    row = tl.arange(0, BM)
    dims = tl.arange(0, D)
    tokens = token + row // G
    q_rows = (row // G) * stride_qt + (row % G) * stride_qh
    d_rows = (row // G) * stride_dt + (row % G) * stride_dh
    q_ptrs = q_base + token.to(tl.int64) * stride_qt + (q_rows[:, None] + dims[None, :])
    d_ptrs = do_base + token.to(tl.int64) * stride_dt + (d_rows[:, None] + dims[None, :])
    lse_ptrs = lse_base + token.to(tl.int64) * G + row
    delta_ptrs = delta_base + token.to(tl.int64) * G + row
    if MASKED or TOKENS * G != BM:
        inside = (tokens < goal) & (row < TOKENS * G)
        q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
        do = tl.load(d_ptrs, mask=inside[:, None], other=0.0)
        lse = tl.load(lse_ptrs, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptrs, mask=inside, other=0.0)
    else:
        q = tl.load(q_ptrs)
        do = tl.load(d_ptrs)
        lse = tl.load(lse_ptrs)
        delta = tl.load(delta_ptrs)
    scores = _dot(k, tl.trans(q), tl.zeros([BN, BM], tl.float32), UPCAST, PRECISION)
    if MASKED:
        seen = (tokens[None, :] - keys[:, None]).to(tl.uint32) < (ends - keys).to(tl.uint32)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores * scale - lse[None, :])
    dv = _dot(weights.to(do.dtype), do, dv, UPCAST, PRECISION)
    dweights = _dot(v, tl.trans(do), tl.zeros([BN, BM], tl.float32), UPCAST, PRECISION)
    dscores = weights * (dweights - delta[None, :])
    dk = _dot(dscores.to(q.dtype), q, dk, UPCAST, PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    TILES,
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
    total_tokens,
    scale,
    sm_scale,
    G: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles of keys, key heads). Writes DK, DV (T, key heads, D), contiguous.

    The queries that see some key of a tile are one range: whole in the middle, masked before (diagonal) and behind
    (keys whose end comes early). Steps begin at the tile's first token.
    """
    at, start, observation, bc, crl, goal = _tile(TILES)
    stop = tl.minimum(at + BN, goal)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    column = tl.arange(0, BN)
    dims = tl.arange(0, D)
    keys = at + column
    inside = keys < stop
    until, whole_until = _query_range(at, stop, start, observation, bc, crl, goal)
    ends = _ends(keys, observation, bc, crl, goal)
    alive = inside & (start <= at)
    k_ptrs = _rows(K, at, kv_head, column, stride_kt, stride_kh, 1)[:, None] + dims[None, :]
    v_ptrs = _rows(V, at, kv_head, column, stride_vt, stride_vh, 1)[:, None] + dims[None, :]
    k = tl.load(k_ptrs, mask=alive[:, None], other=0.0)
    v = tl.load(v_ptrs, mask=alive[:, None], other=0.0)
    q_base = Q + (kv_head * G).to(tl.int64) * stride_qh
    do_base = DOUT + (kv_head * G).to(tl.int64) * stride_dh
    lse_base = LSE + kv_head.to(tl.int64) * total_tokens * G
    delta_base = DELTA + kv_head.to(tl.int64) * total_tokens * G

    steps = (until - at + TOKENS - 1) // TOKENS
    low = tl.minimum((stop - 1 - at + TOKENS - 1) // TOKENS, steps)
    high = tl.maximum((tl.minimum(whole_until, until) - at) // TOKENS, low)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for m in range(low, high):
        dk, dv = _dkdv_tile(
            dk,
            dv,
            k,
            v,
            keys,
            ends,
            at + m * TOKENS,
            goal,
            q_base,
            do_base,
            lse_base,
            delta_base,
            stride_qt,
            stride_qh,
            stride_dt,
            stride_dh,
            scale,
            G,
            D,
            TOKENS,
            BM,
            BN,
            False,
            UPCAST,
            PRECISION,
        )
    for m in range(0, steps - (high - low)):
        dk, dv = _dkdv_tile(
            dk,
            dv,
            k,
            v,
            keys,
            ends,
            at + tl.where(m < low, m, m + high - low) * TOKENS,
            goal,
            q_base,
            do_base,
            lse_base,
            delta_base,
            stride_qt,
            stride_qh,
            stride_dt,
            stride_dh,
            scale,
            G,
            D,
            TOKENS,
            BM,
            BN,
            True,
            UPCAST,
            PRECISION,
        )
    dk_ptrs = _rows(DK, at, kv_head, column, kv_heads * D, D, 1)[:, None] + dims[None, :]
    dv_ptrs = _rows(DV, at, kv_head, column, kv_heads * D, D, 1)[:, None] + dims[None, :]
    tl.store(dk_ptrs, (dk * sm_scale).to(DK.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_ptrs, dv.to(DV.dtype.element_ty), mask=inside[:, None])
