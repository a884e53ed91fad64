"""The operation `role_attention` and the choice of its implementation by name, device, dtype and head size.

It does not compute; every implementation module has the same two functions, `unfit` and `forward`.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from functools import cache
from types import ModuleType

from torch import Tensor

from prts_kernels.role_attention.mask import RoleMask

log = logging.getLogger(__name__)

# name -> module, imported when first used: a backend that is not installed costs nothing.
IMPLEMENTATIONS: dict[str, str] = {
    "reference": "prts_kernels.role_attention.reference",
    "sdpa": "prts_kernels.role_attention.sdpa",
    "triton": "prts_kernels.role_attention.triton",
    "flash": "prts_kernels.role_attention.flash",
}
# In order of preference. Not yet from a measured table: no GPU has run these kernels.
AUTO = {"cuda": ("triton", "flash", "sdpa")}
AUTO_ELSEWHERE = ("sdpa",)


def role_attention(
    q: Tensor, k: Tensor, v: Tensor, key_end: Tensor | RoleMask, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Softmax attention in which key j of row b is visible to query i iff j <= i and i < key_end[b, j].

    q: (B, Hq, L, D); k, v: (B, Hkv, L, D), Hq a multiple of Hkv (grouped queries). key_end: (B, L) int32, or a RoleMask
    of it, which keeps what is derived from it for the next layer. scale: of the scores, default D ** -0.5.
    impl: "auto" or one of IMPLEMENTATIONS. Returns (B, Hq, L, D) in q's dtype; queries that see no key give 0, and what
    lies in keys that no query sees (padding) is never read as a number. Differentiable in q, k and v.
    ValueError: shapes that do not fit together, an unknown `impl`, or one that cannot compute these tensors.
    """
    mask = key_end if isinstance(key_end, RoleMask) else RoleMask(key_end)
    _check(q, k, v, mask)
    if impl == "auto":
        impl = _choose(q, k, v)
    else:
        _refuse(impl, q, k, v)
    return implementation(impl).forward(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def implementation(name: str) -> ModuleType:
    """The module of an implementation, or a ValueError that lists the names and suggests one."""
    if name not in IMPLEMENTATIONS:
        close = difflib.get_close_matches(name, IMPLEMENTATIONS, n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        raise ValueError(f"Unknown impl {name!r} of role_attention{hint}. Allowed: auto, {', '.join(IMPLEMENTATIONS)}.")
    return importlib.import_module(IMPLEMENTATIONS[name])


def _check(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask) -> None:
    batch, length = mask.key_end.shape
    good = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2]) == (batch, length)
        and q.shape[3] == k.shape[3]
        and q.shape[1] % k.shape[1] == 0
    )
    if not good:
        raise ValueError(
            "role_attention takes q (B, Hq, L, D), k and v (B, Hkv, L, D) with Hq a multiple of Hkv, key_end (B, L); "
            f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, key_end {(batch, length)}"
        )


def _refuse(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    reason = implementation(name).unfit(q, k, v)
    if reason:
        raise ValueError(f"impl={name!r} cannot compute this: {reason}. impl='auto' picks one that can.")


def _choose(q: Tensor, k: Tensor, v: Tensor) -> str:
    why: list[str] = []
    for name in AUTO.get(q.device.type, AUTO_ELSEWHERE):
        if name not in IMPLEMENTATIONS:
            continue
        reason = implementation(name).unfit(q, k, v)
        if reason is None:
            _say_once(name, q.device.type, str(q.dtype), q.shape[-1], "; ".join(why))
            return name
        why.append(f"{name}: {reason}")
    raise AssertionError("sdpa fits everything")


@cache
def _say_once(name: str, device: str, dtype: str, head_dim: int, passed_over: str) -> None:
    note = f" (passed over {passed_over})" if passed_over else ""
    log.info("role_attention: impl=auto is %s on %s, %s, head_dim %d%s", name, device, dtype, head_dim, note)
