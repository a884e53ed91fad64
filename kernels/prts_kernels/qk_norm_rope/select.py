"""The operation `qk_norm_rope` and the choice of its implementation by name.

It does not compute; every implementation module has the same two functions, `unfit` and `forward`. impl="auto" is the
specification, except on devices for which measured.json beside this file names another: {device: {"impl", "date"}},
written by `kernels/bench/qk_norm_rope.py --record`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from prts_kernels.registry import implementation

# name -> module, imported when first used.
IMPLEMENTATIONS: dict[str, str] = {
    "reference": "prts_kernels.qk_norm_rope.reference",
    "triton": "prts_kernels.qk_norm_rope.triton",
}
MEASURED = Path(__file__).with_name("measured.json")
_LOADED: dict[str, ModuleType] = {}


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per head and token y = w x / sqrt(mean(x^2) + eps), then y cos + rotate(y) sin with rotate([a, b]) = [-b, a].

    As transformers' Qwen3-VL text attention (q_norm, k_norm, apply_rotary_pos_emb), in fp32 throughout (fp64 for fp64)
    and rounded once. q: (T, Hq, D); k: (T, Hkv, D), any strides of tokens and heads. q_weight, k_weight: (D,).
    cos, sin: (T, D), constants; the axes of multimodal positions are interleaved in them already.
    impl: "auto" or one of IMPLEMENTATIONS. Returns q and k as (T, H, D) of their dtype, contiguous, as packed attention
    takes them. Differentiable once in q, k and the weights.
    ValueError: shapes that do not fit together, an unknown `impl`, or one that cannot compute these tensors.
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    dtypes = (q.dtype, k.dtype, q_weight.dtype, k_weight.dtype, cos.dtype, sin.dtype)
    module = _LOADED[_chosen(impl, q.device, dtypes, q.shape[2])]
    return module.forward(q, q_weight, cos, sin, eps), module.forward(k, k_weight, cos, sin, eps)


@torch.compiler.assume_constant_result  # Dynamo asks once and does not look inside
def _chosen(impl: str, device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str:
    name = _fastest(device) if impl == "auto" else impl
    _LOADED[name] = implementation("qk_norm_rope", IMPLEMENTATIONS, name)
    reason = _LOADED[name].unfit(device, dtypes, head_dim)
    if reason and impl == "auto":
        return _chosen("reference", device, dtypes, head_dim)
    if reason:
        raise ValueError(f"impl={name!r} cannot compute this: {reason}. impl='auto' picks one that can.")
    return name


@cache
def _fastest(device: torch.device) -> str:
    """By name of the device; "reference" where nothing has been measured."""
    if device.type != "cuda" or not MEASURED.exists():
        return "reference"
    table = json.loads(MEASURED.read_text(encoding="utf-8"))
    return table.get(torch.cuda.get_device_name(device), {}).get("impl", "reference")


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    good = (
        q.ndim == k.ndim == 3
        and q.shape[0] == k.shape[0]
        and q.shape[2] == k.shape[2]
        and q.shape[2] % 2 == 0
        and q_weight.shape == k_weight.shape == q.shape[2:]
        and cos.shape == sin.shape == (q.shape[0], q.shape[2])
    )
    if not good:
        raise ValueError(
            "qk_norm_rope takes q (T, Hq, D), k (T, Hkv, D), weights (D,), cos and sin (T, D), D even; found "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, weights {tuple(q_weight.shape)} and {tuple(k_weight.shape)}, "
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("qk_norm_rope: cos and sin are constants, they get no gradient")
