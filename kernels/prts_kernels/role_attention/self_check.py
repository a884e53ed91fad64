"""Compare an implementation with the reference on a small case, before impl="auto" relies on it on a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from prts_kernels.role_attention import reference
from prts_kernels.role_attention.mask import RoleMask

TOLERANCE = 0.02  # of the largest value: far beyond rounding, far below what a wrong mask does
SPANS = np.array([[0, 90, 100, 120, 130], [130, 150, 170, 185, 191]])  # of 200 tokens, the last 9 of them padding
Forward = Callable[[Tensor, Tensor, Tensor, RoleMask, float], Tensor]


@cache
def fault(forward: Forward, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What is wrong with output or gradients, and what to do about it; None where all is well. Asked once a process."""
    try:
        wrong = _differing(forward, device, dtype, head_dim)
    except Exception as err:  # noqa: BLE001  whatever a kernel or its compiler raises: not this one
        wrong = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
    if not wrong:
        return None
    return (
        f"it failed its self-check against the reference ({wrong}); what computes instead is right but slower. "
        "Update torch and triton or the driver, or run kernels/bench/role_attention.py --record for this device's best"
    )


def _differing(forward: Forward, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    rng = torch.Generator().manual_seed(0)
    # The caller's modes must not reach in here: no_grad, autocast, the hooks of activation checkpointing.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        mask = RoleMask.from_spans(SPANS, 200).to(device)
        made = [torch.randn(200, heads, head_dim, generator=rng).to(device, dtype) for heads in (4, 2, 2, 4)]
        for x in made[:3]:
            x[SPANS[-1, -1] :] = float("nan")  # padding is no one's business
        found, right = (
            _out_and_gradients(run, mask, *(x.to(kind) for x in made))
            for run, kind in ((forward, dtype), (reference.forward, torch.float32))
        )
    off = {
        name: float((a.float() - b).abs().max() / b.abs().max())
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, right, strict=True)
    }
    return ", ".join(f"{name} is {100 * x:.3g} % off" for name, x in off.items() if not x <= TOLERANCE)


def _out_and_gradients(forward: Forward, mask: RoleMask, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    q, k, v = inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = forward(q, k, v, mask, q.shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]
