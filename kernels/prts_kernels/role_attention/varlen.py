"""Stock varlen-causal self-attention kernels behind one signature, with the log-sum-exp: what `split` is built on.

Segments are packed end to end, and every token of a segment sees itself and what is before it. A backward takes
whatever out and lse it is given, so that the caller may have merged more keys into them.

Shapes: M tokens, P segments; q, out, dout, dq (M, Hq, D); k, v, dk, dv (M, Hkv, D); lse (Hq, M) fp32, natural
logarithm; cu_seqlens (P + 1,) int32, from 0 to M; longest segment in tokens. Needs D dense in memory.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from prts_kernels.role_attention.attention_spec import AttentionSpec

HALF = (torch.float16, torch.bfloat16)
Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Backend:
    """unsupported_reason(spec): why it cannot compute, or None.

    forward(q, k, v, cu_seqlens, longest, scale) -> (out, lse)
    backward(dout, q, k, v, out, lse, cu_seqlens, longest, scale) -> (dq, dk, dv)
    All of them take fewer key heads than query heads without copies of K and V.
    """

    unsupported_reason: Callable[[AttentionSpec], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float], Grads]


@cache
def choose(spec: AttentionSpec, backend: str | None = None) -> tuple[str, str | None]:
    """(name, None) of the first backend that fits, or of the one named; else the reason why none does, or it does not.

    ValueError: no backend has that name.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"Unknown varlen backend {backend!r}. Allowed: {', '.join(BACKENDS)}.")
        return backend, BACKENDS[backend].unsupported_reason(spec)
    reasons = []
    for name, candidate in BACKENDS.items():
        reason = candidate.unsupported_reason(spec)
        if name == "eager" and spec.device.type != "cpu":
            reason = "slow, only when asked for by name"
        if reason is None:
            return name, None
        reasons.append(f"{name}: {reason}")
    return "", "no stock varlen kernel fits (" + "; ".join(reasons) + ")"


def _unsupported_on_cuda(
    spec: AttentionSpec, oldest: tuple[int, int], youngest: tuple[int, int], widest: int
) -> str | None:
    if spec.device.type != "cuda" or torch.version.hip:
        return f"it runs on CUDA devices, found {spec.device.type}"
    if spec.dtype not in HALF:
        return f"it computes fp16 and bf16, found {spec.dtype}"
    if spec.head_dim % 8 or spec.head_dim > widest:
        return f"head_dim is a multiple of 8 up to {widest}, found {spec.head_dim}"
    found = torch.cuda.get_device_capability(spec.device)
    if not oldest <= found <= youngest:
        return f"it needs compute capability {oldest[0]}.{oldest[1]} to {youngest[0]}.x, found {found[0]}.{found[1]}"
    return None


@cache
def _holds(package: str, file: str) -> bool:
    """Whether an installed package has this file. flash-attn 2 and flash-attn-4 share one package name."""
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found else None
    return any((Path(place) / file).exists() for place in places or [])


@cache
def _broken(module: str) -> str | None:
    """Why an installed module does not import, say for another torch or for want of its own requirements; or None."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as err:
        return f"{module} does not import: {' '.join(str(err).split())}"
    return None


@cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # unpacked by hand
        return "unknown"


# flash-attn-4 (4.0.0b36): CuTe DSL kernels for Hopper and Blackwell, compiled at the first call (seconds).


def _fa4_unsupported_reason(spec: AttentionSpec) -> str | None:
    if not _holds("flash_attn", "cute/interface.py"):
        return "flash-attn-4 is not installed"
    if _version("nvidia-cutlass-dsl") in ("4.6.0", "4.6.1"):
        return "flash-attn-4's backward hangs with nvidia-cutlass-dsl 4.6.0 and 4.6.1"
    return _unsupported_on_cuda(spec, (9, 0), (10, 9), 128) or _broken("flash_attn.cute.interface")


def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        return_lse=True,
    )
    return out, lse


def _fa4_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> Grads:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=scale,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


# flash-attn 3 (package flash_attn_interface, built from source): Hopper only.


def _fa3_unsupported_reason(spec: AttentionSpec) -> str | None:
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "flash-attn 3 is not installed"
    return _unsupported_on_cuda(spec, (9, 0), (9, 9), 256) or _broken("flash_attn_interface")


def _fa3_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    import flash_attn_interface  # noqa: F401  its import registers the operators

    # Older builds give these no defaults.
    unused = dict.fromkeys(
        (
            "k_new",
            "v_new",
            "q_v",
            "out",
            "cu_seqlens_k_new",
            "seqused_q",
            "seqused_k",
            "page_table",
            "kv_batch_idx",
            "leftpad_k",
            "rotary_cos",
            "rotary_sin",
            "seqlens_rotary",
            "q_descale",
            "k_descale",
            "v_descale",
        )
    )
    out, lse, *_ = torch.ops.flash_attn_3.fwd(
        q,
        k,
        v,
        **unused,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        is_causal=True,
        num_splits=1,
    )
    return out, lse


def _fa3_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> Grads:
    import flash_attn_interface  # noqa: F401

    dq, dk, dv = _grads_like(q, k, v)
    torch.ops.flash_attn_3.bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq=dq,
        dk=dk,
        dv=dv,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        is_causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


# flash-attn 2 as a package, and as torch carries it.


def _fa2_unsupported_reason(spec: AttentionSpec) -> str | None:
    if not _holds("flash_attn", "flash_attn_interface.py"):
        return "flash-attn 2 is not installed"
    return _unsupported_on_cuda(spec, (8, 0), (12, 9), 256) or _broken("flash_attn.flash_attn_interface")


def _fa2_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, cu_seqlens, cu_seqlens, _two_at_least(longest), _two_at_least(longest), 0.0, scale, causal=True
    )
    return out, lse


def _fa2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> Grads:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = _grads_like(q, k, v)
    _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        cu_seqlens,
        cu_seqlens,
        _two_at_least(longest),
        _two_at_least(longest),
        0.0,
        scale,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _torch_unsupported_reason(spec: AttentionSpec) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "torch is built without flash attention"
    return _unsupported_on_cuda(spec, (8, 0), (12, 9), 256)


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    # torch.nn.attention.varlen is the public face of this, but refuses grouped queries before torch 2.12; the operator
    # below it has always taken them.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, _two_at_least(longest), _two_at_least(longest), 0.0, True, False, scale=scale
    )
    return out, lse


def _torch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> Grads:
    # No dropout: the generator's state is never read. The operator asks torch itself whether to be deterministic.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        cu_seqlens,
        _two_at_least(longest),
        _two_at_least(longest),
        0.0,
        True,
        state,
        unused,
        scale=scale,
    )


def _two_at_least(longest: int) -> int:
    """flash-attn 2 takes a path of its own, for decoding, where all segments have one token. It is only a bound."""
    return max(longest, 2)


def _grads_like(q: Tensor, k: Tensor, v: Tensor) -> Grads:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]


# Plain torch, segment by segment: any device and dtype (fp64 for fp64, else fp32 inside), for tests and the CPU.


def _eager_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=wide(q.dtype), device=q.device)
    for low, high in pairwise(cu_seqlens.tolist()):
        scores = _scores(q[low:high], k[low:high], scale)
        lse[:, low:high] = scores.logsumexp(-1)
        weights = (scores - lse[:, low:high, None]).exp()
        out[low:high] = torch.einsum("hij,jhd->ihd", weights, _heads(v[low:high], groups)).to(q.dtype)
    return out, lse


def _eager_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
) -> Grads:
    groups = q.shape[1] // k.shape[1]
    grads = _grads_like(q, k, v)
    for low, high in pairwise(cu_seqlens.tolist()):
        do, q_ = dout[low:high].to(lse.dtype), q[low:high].to(lse.dtype)
        k_, v_ = _heads(k[low:high], groups), _heads(v[low:high], groups)
        weights = (_scores(q[low:high], k[low:high], scale) - lse[:, low:high, None]).exp()
        delta = (do * out[low:high]).sum(-1).T
        dscores = weights * (torch.einsum("ihd,jhd->hij", do, v_) - delta[:, :, None]) * scale
        for into, value in zip(
            grads,
            (
                torch.einsum("hij,jhd->ihd", dscores, k_),
                torch.einsum("hij,ihd->jhd", dscores, q_).unflatten(1, (-1, groups)).sum(2),
                torch.einsum("hij,ihd->jhd", weights, do).unflatten(1, (-1, groups)).sum(2),
            ),
            strict=True,
        ):
            into[low:high] = value.to(into.dtype)
    return grads


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(Hq, n, n) of one segment, -inf above the diagonal."""
    kind = wide(q.dtype)
    scores = torch.einsum("ihd,jhd->hij", q.to(kind), _heads(k, q.shape[1] // k.shape[1])) * scale
    return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))


def _heads(x: Tensor, groups: int) -> Tensor:
    return x.to(wide(x.dtype)).repeat_interleave(groups, dim=1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# In the order of preference: Hopper's kernels first, each refuses the machines it is not made for.
BACKENDS = {
    "fa4": Backend(_fa4_unsupported_reason, _fa4_forward, _fa4_backward),
    "fa3": Backend(_fa3_unsupported_reason, _fa3_forward, _fa3_backward),
    "fa2": Backend(_fa2_unsupported_reason, _fa2_forward, _fa2_backward),
    "torch": Backend(_torch_unsupported_reason, _torch_forward, _torch_backward),
    "eager": Backend(lambda spec: None, _eager_forward, _eager_backward),
}
