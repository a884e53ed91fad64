"""RMS norm and rotary embedding by our own Triton kernels, forward and backward.

Bound by memory: forward one read and one write of q and k (4 bytes an element in bf16, where eager moves 56), backward
two reads and one write. Nothing but the inputs is kept for the backward. `TRITON_INTERPRET=1` in the environment before
first use runs it on the CPU, for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)
# Heads a program and warps; with `tokens` a lane loads 16 bytes of bf16 at a time, and nothing spills. Not measured.
HEADS, WARPS = 8, 4


def unfit(device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str | None:
    """Why tensors of these dtypes cannot be computed here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA devices, found {device.type}"
    odd = sorted({str(dtype) for dtype in dtypes if dtype not in DTYPES})
    if odd:
        return f"dtypes are of {', '.join(map(str, DTYPES))}, found {', '.join(odd)}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is one of {HEAD_DIMS}, found {head_dim}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (T, H, D), weight (D,), cos and sin (T, D) -> (T, H, D) in x's dtype."""
    if x.numel() == 0:
        return x * 1.0
    return _norm_rope(x, weight, cos, sin, eps)


@torch.library.custom_op("prts::norm_rope", mutates_args=())
def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    from prts_kernels.qk_norm_rope import triton_kernels

    x, weight, cos, sin = (_unit_stride(y) for y in (x, weight, cos, sin))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_kernels.forward_kernel[_grid(x)](
        x, weight, cos, sin, out, *x.stride()[:2], cos.stride(0), sin.stride(0), len(x), eps, **_constants(x)
    )
    return out


@_norm_rope.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("prts::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from prts_kernels.qk_norm_rope import triton_kernels

    dout, x, weight, cos, sin = (_unit_stride(y) for y in (dout, x, weight, cos, sin))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = _grid(x)
    partial = torch.empty((math.prod(grid), x.shape[2]), dtype=torch.float32, device=x.device)
    triton_kernels.backward_kernel[grid](
        x, weight, cos, sin, dout, dx, partial,
        *x.stride()[:2], cos.stride(0), sin.stride(0), *dout.stride()[:2], len(x), eps, **_constants(x),
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


@_norm_rope_backward.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = _norm_rope_backward(dout, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None, None, None


_norm_rope.register_autograd(_backward, setup_context=_keep)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tokens(head_dim: int) -> int:
    """Tokens a program: half a head of each is 8 elements a thread."""
    return 16 * WARPS * 32 // head_dim


def _grid(x: Tensor) -> tuple[int, int]:
    return -(-len(x) // tokens(x.shape[2])), x.shape[1] // _heads(x)


def _heads(x: Tensor) -> int:
    """Heads a program: what divides them."""
    return math.gcd(x.shape[1], HEADS)


def _constants(x: Tensor) -> dict[str, Any]:
    fixed = {"H": x.shape[1], "D": x.shape[2], "BT": tokens(x.shape[2]), "HB": _heads(x)}
    return fixed if os.environ.get("TRITON_INTERPRET") == "1" else fixed | {"num_warps": WARPS}
