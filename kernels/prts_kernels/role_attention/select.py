"""The operation `role_attention` and the choice of its implementation by name, device, dtype and head size.

Every implementation module has the same two functions, `unsupported_reason` and `forward`.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prts_kernels import registry
from prts_kernels.role_attention import autotune_table, self_check
from prts_kernels.role_attention.attention_spec import AttentionSpec
from prts_kernels.role_attention.mask import RoleMask

log = logging.getLogger(__name__)

# name -> module, imported when first used: a backend that is not installed costs nothing.
IMPLEMENTATIONS: dict[str, str] = {
    "reference": "prts_kernels.role_attention.reference",
    "sdpa": "prts_kernels.role_attention.sdpa",
    "flex": "prts_kernels.role_attention.flex",
    "split": "prts_kernels.role_attention.split",
    "triton": "prts_kernels.role_attention.triton",
}
_LOADED: dict[str, ModuleType] = {}  # Dynamo follows a lookup, but no import by name


def role_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_end: Tensor | RoleMask,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention over packed samples in which key j is visible to query i iff j <= i and i < key_end[j].

    q: (T, Hq, D); k, v: (T, Hkv, D), Hq a multiple of Hkv (grouped queries), all samples of a batch end to end.
    key_end: (T,) int32, or a RoleMask, which is made once a batch and keeps what is derived from it for the next layer
    (a tensor is read back to the host in every call). cu_seqlens: (S + 1,) int32 bounds of segments, beside a tensor:
    checked, not needed. scale: of the scores, default D ** -0.5. impl: "auto" or one of IMPLEMENTATIONS.
    Returns (T, Hq, D) in q's dtype; queries that see no key give 0, and what lies in keys that no query sees (padding)
    is never read as a number. Differentiable in q, k and v.
    ValueError: shapes that do not fit together, an unknown `impl`, or one that cannot compute these tensors.
    """
    mask = key_end if isinstance(key_end, RoleMask) else RoleMask(key_end, cu_seqlens)
    _check(q, k, v, mask)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    name = _chosen(impl, q.device, (q.dtype, k.dtype, v.dtype), q.shape[2], mask.samples is not None, grad)
    return _LOADED[name].forward(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def implementation(name: str) -> ModuleType:
    """The module of an implementation, or a ValueError that lists the names and suggests one."""
    return registry.implementation("role_attention", IMPLEMENTATIONS, name)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask) -> None:
    good = (
        q.ndim == k.ndim == 3
        and k.shape == v.shape
        and q.shape[0] == k.shape[0] == mask.total
        and q.shape[2] == k.shape[2]
        and q.shape[1] % k.shape[1] == 0
    )
    if not good:
        raise ValueError(
            "role_attention takes q (T, Hq, D), k and v (T, Hkv, D) with Hq a multiple of Hkv, key_end (T,); "
            f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, key_end {(mask.total,)}"
        )


@torch.compiler.assume_constant_result  # Dynamo asks once and does not look inside
def _chosen(impl: str, *spec: Any) -> str:
    name = choose(impl, AttentionSpec(*spec)).name
    _LOADED[name] = implementation(name)
    return name


class Choice(NamedTuple):
    """reason: why this implementation, and why none that would be faster."""

    name: str
    reason: str


@cache
def choose(impl: str, spec: AttentionSpec) -> Choice:
    """`impl` itself where it can compute this; for "auto" the first of this device's order that can and is right.

    Says once, through logging, what "auto" is, and warns where an implementation was passed over.
    """
    if impl != "auto":
        reason = implementation(impl).unsupported_reason(spec)
        if reason:
            raise ValueError(f"impl={impl!r} cannot compute this: {reason}. impl='auto' picks one that can.")
        return Choice(impl, "asked for by name")
    passed_over: list[str] = []
    order, source = autotune_table.order(spec)
    for name in order:
        module = implementation(name)
        fault = module.unsupported_reason(spec)
        if fault is None and name != "sdpa":
            fault = self_check.fault(module.forward, spec.device, spec.dtype, spec.head_dim)
        if fault is None:
            break
        passed_over.append(f"passed over {name}: {fault}")
    choice = Choice(name, "; ".join([source, *passed_over]))
    log.log(
        logging.WARNING if passed_over else logging.INFO,
        "role_attention: impl=auto is %s on %s, %s, head_dim %d: %s",
        name,
        spec.device.type,
        ", ".join(dict.fromkeys(map(str, spec.dtypes))),
        spec.head_dim,
        choice.reason,
    )
    return choice
