"""Role-aware attention as an exact split: stock varlen-causal attention over the parts, and prefix attention.

    1. every sample's parts {BC}, {CRL action}, {goal} are causal within themselves: one stock varlen call (`varlen.py`)
    2. CRL actions also see their observation: prefix attention goes on from the (out, log-sum-exp) of step 1, in place

Backward: the stock backward with the merged out and log-sum-exp is exact for the pairs of step 1, since both define the
weights, and prefix attention adds its own pairs. No token is copied, except where a batch has padding. As deterministic
as the stock kernel; prefix attention gives the same bits on every run.

Shapes: T tokens, M of them real (no padding); K ranges; q, out (T, Hq, D); k, v (T, Hkv, D); lse (Hq, M), natural.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prts_kernels.role_attention import varlen
from prts_kernels.role_attention.attention_spec import AttentionSpec
from prts_kernels.role_attention.mask import RoleMask

HEAD_DIMS = (16, 32, 64, 128)  # of prefix attention by Triton


@dataclass(frozen=True)
class PrefixTile:
    """Rows (queries of all heads of a group) and keys a tile, warps and pipeline stages of prefix attention."""

    rows: int
    keys: int
    warps: int
    stages: int


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why this cannot be computed here, or None."""
    if not spec.of_samples:
        return "key_end does not consist of sample parts"
    if len(set(spec.dtypes)) > 1:
        return f"q, k and v have one dtype, found {', '.join(map(str, spec.dtypes))}"
    return varlen.choose(spec)[1]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float, backend: str | None = None) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D) in q's dtype.

    backend: the varlen backend, one of `varlen.BACKENDS`; by default the first that fits. ValueError: it does not fit.
    """
    parts = mask.samples
    assert parts is not None, "unsupported_reason says so"
    out, _ = _split(
        q,
        k,
        v,
        parts.real,
        parts.parts,
        parts.longest_part,
        parts.prefix_ranges_of_real,
        parts.most_queries,
        parts.most_keys,
        scale,
        _backend_for(backend, q.device, (q.dtype, k.dtype, v.dtype), q.shape[2]),
    )
    return out


@torch.compiler.assume_constant_result  # Dynamo asks once and does not look inside
def _backend_for(backend: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str:
    name, reason = varlen.choose(AttentionSpec(device, dtypes, head_dim, of_samples=True, grad=True), backend)
    if reason:
        raise ValueError(f"split by varlen backend {name!r}: {reason}")
    return name


@torch.library.custom_op("prts::role_attention_split", mutates_args=())
def _split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor,
    longest: int,
    prefix_ranges: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse). real: (M,) int64 tokens that are no padding, or None; cu_seqlens, prefix_ranges: among these."""
    q_, k_, v_ = (_packed(x, real) for x in (q, k, v))
    if not longest:
        return q.new_zeros(q.shape), _new_lse(q, len(q_))
    with torch.cuda.device_of(q):
        out, lse = varlen.BACKENDS[backend].forward(q_, k_, v_, cu_seqlens, longest, scale)
        out, lse = out.contiguous(), lse.contiguous()
        if len(prefix_ranges):
            attend = _prefix_attention_triton if _by_triton(q) else _prefix_attention
            attend(q_, k_, v_, out, lse, prefix_ranges, most_queries, most_keys, scale)
    return _unpacked(out, real, len(q)), lse


@torch.library.custom_op("prts::role_attention_split_backward", mutates_args=())
def _split_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor,
    longest: int,
    prefix_ranges: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if not longest:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    do, q_, k_, v_, out_ = (_packed(x, real) for x in (dout, q, k, v, out))
    with torch.cuda.device_of(q):
        grads = varlen.BACKENDS[backend].backward(do, q_, k_, v_, out_, lse, cu_seqlens, longest, scale)
        dq, dk, dv = (x.contiguous() for x in grads)
        if len(prefix_ranges):
            attend = _prefix_attention_backward_triton if _by_triton(q) else _prefix_attention_backward
            attend(do, q_, k_, v_, out_, lse, dq, dk, dv, prefix_ranges, most_queries, most_keys, scale)
    return _unpacked(dq, real, len(q)), _unpacked(dk, real, len(q)), _unpacked(dv, real, len(q))


@_split.register_fake
def _(q, k, v, real, cu_seqlens, longest, prefix_ranges, most_queries, most_keys, scale, backend):
    return q.new_empty(q.shape), _new_lse(q, len(q if real is None else real))


@_split_backward.register_fake
def _(dout, q, k, v, out, lse, real, cu_seqlens, longest, prefix_ranges, most_queries, most_keys, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, real, cu_seqlens, longest, prefix_ranges, *ctx.rest = inputs
    ctx.longest = longest
    ctx.save_for_backward(q, k, v, *output, real, cu_seqlens, prefix_ranges)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, real, cu_seqlens, prefix_ranges = ctx.saved_tensors
    grads = _split_backward(dout, q, k, v, out, lse, real, cu_seqlens, ctx.longest, prefix_ranges, *ctx.rest)
    return (*grads, *([None] * 8))


_split.register_autograd(_backward, setup_context=_keep)


def _packed(x: Tensor, real: Tensor | None) -> Tensor:
    """The real tokens, end to end, last dimension dense. Without padding no copy."""
    x = x.detach() if real is None else x.detach().index_select(0, real)
    return x if x.stride(-1) == 1 else x.contiguous()


def _unpacked(x: Tensor, real: Tensor | None, total: int) -> Tensor:
    """Back among all tokens, 0 in padding."""
    return x if real is None else x.new_zeros((total, *x.shape[1:])).index_copy_(0, real, x)


def _new_lse(q: Tensor, tokens: int) -> Tensor:
    return torch.empty((q.shape[1], tokens), dtype=varlen.wide(q.dtype), device=q.device)


# Prefix attention in plain torch: any device and dtype. All ranges side by side, padded to the longest.


@dataclass(frozen=True)
class _Sides:
    """query_at (K, n), key_at (K, m): tokens; query_is, key_is: which of these are no padding."""

    query_at: Tensor
    key_at: Tensor
    query_is: Tensor
    key_is: Tensor

    @classmethod
    def of(cls, prefix_ranges: Tensor, most_queries: int, most_keys: int) -> _Sides:
        def side(first: Tensor, last: Tensor, most: int) -> tuple[Tensor, Tensor]:
            at = first.long()[:, None] + torch.arange(most, device=first.device)
            inside = at < last[:, None]
            return torch.where(inside, at, first.long()[:, None]), inside

        (query_at, query_is), (key_at, key_is) = (
            side(prefix_ranges[:, 0], prefix_ranges[:, 1], most_queries),
            side(prefix_ranges[:, 2], prefix_ranges[:, 3], most_keys),
        )
        return cls(query_at, key_at, query_is, key_is)

    def keys(self, x: Tensor, groups: int) -> Tensor:
        """(K, m, Hq, D), 0 in padding."""
        return varlen._heads(x[self.key_at].masked_fill(~self.key_is[:, :, None, None], 0).flatten(0, 1), groups).view(
            *self.key_at.shape, -1, x.shape[-1]
        )

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """(K, Hq, n, m), -inf for padded keys."""
        scores = torch.einsum("cihd,cjhd->chij", q[self.query_at].to(k.dtype), k) * scale
        return scores.masked_fill(~self.key_is[:, None, None, :], float("-inf"))


def _prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_ranges: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
) -> None:
    """Merge prefix attention into out and lse, in place."""
    sides, groups = _Sides.of(prefix_ranges, most_queries, most_keys), q.shape[1] // k.shape[1]
    scores = sides.scores(q, sides.keys(k, groups), scale)
    before = lse[:, sides.query_at].transpose(0, 1)  # (K, Hq, n)
    merged = torch.logaddexp(before, scores.logsumexp(-1))
    found = torch.einsum("chij,cjhd->cihd", (scores - merged[..., None]).exp(), sides.keys(v, groups))
    found = found + out[sides.query_at] * (before - merged).exp().transpose(1, 2)[..., None]
    at = sides.query_at[sides.query_is]
    out[at] = found[sides.query_is].to(out.dtype)
    lse[:, at] = merged.transpose(1, 2)[sides.query_is].T


def _prefix_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    prefix_ranges: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
) -> None:
    """Add prefix attention's share onto dq, dk and dv, in place. No two ranges share a query or a key."""
    sides, groups = _Sides.of(prefix_ranges, most_queries, most_keys), q.shape[1] // k.shape[1]
    k_, v_ = sides.keys(k, groups), sides.keys(v, groups)
    do = dout[sides.query_at].masked_fill(~sides.query_is[:, :, None, None], 0).to(k_.dtype)
    weights = (sides.scores(q, k_, scale) - lse[:, sides.query_at].transpose(0, 1)[..., None]).exp()
    delta = (do * out[sides.query_at]).sum(-1).transpose(1, 2)
    dscores = weights * (torch.einsum("cihd,cjhd->chij", do, v_) - delta[..., None]) * scale
    q_ = q[sides.query_at].to(k_.dtype)
    for into, at, inside, value in (
        (dq, sides.query_at, sides.query_is, torch.einsum("chij,cjhd->cihd", dscores, k_)),
        (dk, sides.key_at, sides.key_is, torch.einsum("chij,cihd->cjhd", dscores, q_)),
        (dv, sides.key_at, sides.key_is, torch.einsum("chij,cihd->cjhd", weights, do)),
    ):
        summed = value.unflatten(2, (into.shape[1], -1)).sum(3)  # over the heads of a group
        into[at[inside]] = (into[at[inside]] + summed[inside]).to(into.dtype)


# Prefix attention by Triton (`split_kernels.py`).


def _by_triton(q: Tensor) -> bool:
    if _interpreted():
        return True
    fits = q.is_cuda and q.dtype in varlen.HALF and q.shape[-1] in HEAD_DIMS
    return fits and importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def default_tiles(head_dim: int) -> dict[str, PrefixTile]:
    """Tiles by kernel, by what compiles for sm_90 with tensor cores and no spills. Not measured on a GPU yet."""
    if _interpreted():
        return dict.fromkeys(("forward", "dq", "dkdv"), PrefixTile(16, 16, 1, 1))
    rows = 32 if head_dim > 64 else 64  # of dK and dV, whose accumulators fill the registers
    return {"forward": PrefixTile(64, 64, 4, 3), "dq": PrefixTile(64, 64, 4, 2), "dkdv": PrefixTile(rows, 64, 4, 2)}


def _prefix_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_ranges: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
) -> None:
    from prts_kernels.role_attention import split_kernels

    tile, groups = default_tiles(q.shape[2])["forward"], q.shape[1] // k.shape[1]
    split_kernels.forward_kernel[_tiles(most_queries * groups, tile.rows), k.shape[1], len(prefix_ranges)](
        q, k, v, out, lse, prefix_ranges, *_strides(q, k, v, out), len(q), scale, **_constants(q, k, tile)
    )


def _prefix_attention_backward_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    prefix_ranges: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
) -> None:
    from prts_kernels.role_attention import split_kernels

    tiles, groups = default_tiles(q.shape[2]), q.shape[1] // k.shape[1]
    delta = torch.empty_like(lse)  # of prefix attention's rows only; written by the first kernel, read by the second
    tile = tiles["dq"]
    split_kernels.dq_kernel[_tiles(most_queries * groups, tile.rows), k.shape[1], len(prefix_ranges)](
        q,
        k,
        v,
        out,
        dout,
        lse,
        delta,
        prefix_ranges,
        dq,
        *_strides(q, k, v, out, dout, dq),
        len(q),
        scale,
        **_constants(q, k, tile),
    )
    tile = tiles["dkdv"]
    split_kernels.dkdv_kernel[_tiles(most_keys, tile.keys), k.shape[1], len(prefix_ranges)](
        q,
        k,
        v,
        dout,
        lse,
        delta,
        prefix_ranges,
        dk,
        dv,
        *_strides(q, k, v, dout, dk, dv),
        len(q),
        scale,
        **_constants(q, k, tile),
    )


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(q: Tensor, k: Tensor, tile: PrefixTile) -> dict[str, Any]:
    upcast = _interpreted() and q.dtype == torch.bfloat16
    fixed = {"G": q.shape[1] // k.shape[1], "D": q.shape[2], "BM": tile.rows, "BN": tile.keys, "UPCAST": upcast}
    return fixed if _interpreted() else fixed | {"num_warps": tile.warps, "num_stages": tile.stages}
