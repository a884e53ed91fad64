"""Role-aware attention on stock flash-attn: one varlen-causal call, exact, with no kernel of ours and no merge.

flash-attn's causal mask is aligned bottom-right: when a sequence has more keys than queries, the last query sees all
keys.
So every run of queries becomes a sequence of its own whose keys are what it sees of earlier runs, gathered, and then
itself:

    observation -> [observation]      instruction, answer -> [observation, instruction, answer]
    CRL action  -> [observation, CRL action]              CRL goal -> [CRL goal]

It does not know roles; it reads the runs off `key_end`. The price is a gathered copy of keys and values.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prts_kernels.role_attention.mask import RoleMask


def unfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these tensors cannot be computed here, or None."""
    if q.device.type != "cuda":
        return "flash-attn runs on CUDA only"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes fp16 and bf16, not {q.dtype}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'prts[gpu]')"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    """q (B, Hq, L, D), k and v (B, Hkv, L, D) -> (B, Hq, L, D) in q's dtype."""
    from flash_attn import flash_attn_varlen_func

    return attend(q, k, v, mask, scale, flash_attn_varlen_func)


@dataclass(frozen=True)
class Sequences:
    """Flat positions (row * L + column) of queries and of the keys they see, sequence after sequence."""

    query_at: Tensor
    key_at: Tensor
    cu_query: Tensor
    cu_key: Tensor
    max_query: int
    max_key: int


_PLANS: WeakKeyDictionary[RoleMask, Sequences] = WeakKeyDictionary()  # one a batch, shared by all layers


def attend(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float, varlen: Callable[..., Any]) -> Tensor:
    """The operation on any varlen-causal attention with flash-attn's signature and bottom-right alignment."""
    batch, heads, length, width = q.shape
    if mask not in _PLANS:
        _PLANS[mask] = sequences(mask.key_end)
    plan = _PLANS[mask]

    def flat(x: Tensor, at: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * length, x.shape[1], width).index_select(0, at)

    out = varlen(
        flat(q, plan.query_at), flat(k, plan.key_at), flat(v, plan.key_at),
        cu_seqlens_q=plan.cu_query, cu_seqlens_k=plan.cu_key, max_seqlen_q=plan.max_query, max_seqlen_k=plan.max_key,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    whole = out.new_zeros(batch * length, heads, width).index_copy(0, plan.query_at, out)
    return whole.view(batch, length, heads, width).transpose(1, 2)


def sequences(key_end: Tensor) -> Sequences:
    """Runs of equal `key_end` as varlen sequences. ValueError where a run is cut by an earlier key's end: no such
    mask comes
    from the parts of a sample."""
    length = key_end.shape[1]
    query_at: list[int] = []
    key_at: list[int] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    for row, ends in enumerate(key_end.tolist()):
        cuts = [0, *(i for i in range(1, length) if ends[i] != ends[i - 1]), length]
        runs = [(start, stop, ends[start]) for start, stop in pairwise(cuts)]
        for number, (start, stop, end) in enumerate(runs):
            if end <= start:
                continue  # padding
            if end < stop or any(start < before[2] < stop for before in runs[:number]):
                raise ValueError(f"row {row}: positions {start} to {stop} do not see the same earlier keys")
            seen = [run for run in runs[:number] if run[2] >= stop]
            keys = [i for first, last, _ in [*seen, (start, stop, end)] for i in range(first, last)]
            query_at += range(row * length + start, row * length + stop)
            key_at += [row * length + i for i in keys]
            query_lengths.append(stop - start)
            key_lengths.append(len(keys))

    def tensor(values: list[int], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device=key_end.device)

    def cumulative(lengths: list[int]) -> Tensor:
        return torch.nn.functional.pad(tensor(lengths, torch.int32).cumsum(0, dtype=torch.int32), (1, 0))

    return Sequences(
        tensor(query_at, torch.int64), tensor(key_at, torch.int64), cumulative(query_lengths), cumulative(key_lengths),
        max(query_lengths, default=0), max(key_lengths, default=0),
    )  # fmt: skip
