"""Judge an attention by flash-attention's own rule, on O, dQ, dK and dV, with poisoned outputs.

    max|x - ref32| <= 2 max|eager - ref32| + 2 max|(ref + 0.3 - 0.3) - ref|

`eager` is attention in the inputs' dtype. Poisoned: what a kernel does not write is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines import Attend
from prts_kernels.role_attention import RoleMask
from prts_kernels.role_attention import reference as specification

NAMES = ("out", "dq", "dk", "dv")
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def judge(attend: Attend, spans: np.ndarray, given: Four) -> dict[str, Any]:
    """{"why": empty where the rule holds, "error": the largest, "same_bits": whether a second run gave the same}.

    spans: (N, 5), the samples as `attend` is to see them. given: q, k, v and the gradient of the output.
    """
    q, k, v, dout = given

    def run() -> Four:
        with poisoned(q.device):
            state = attend.forward(q, k, v)
            return state[3].detach().clone(), *attend.backward(state, dout)

    first, second = run(), run()
    exact = by_sample(spans, specification.forward, (q.float(), k.float(), v.float(), dout.float()))
    rough = by_sample(spans, eager, given)
    why, largest = [], 0.0
    for name, x, right, low in zip(NAMES, first, exact, rough, strict=True):
        narrow = right.to(low.dtype)
        rounding = ((narrow + 0.3 - 0.3).float() - narrow.float()).abs().max()
        limit = float(2 * (low.float() - right).abs().max() + 2 * rounding)
        limit += 1e-5 * (q.dtype == torch.float32)  # sums in another order
        error = float((x.float() - right).abs().max())
        if not error <= limit:
            why.append(f"{name} {error:.3g} > {limit:.3g}")
        largest = max(largest, error) if math.isfinite(error) else math.inf
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return {"why": f"wrong by the rule: {', '.join(why)}" if why else "", "error": largest, "same_bits": same}


def by_sample(spans: np.ndarray, attend: Callable[..., Tensor], given: Four) -> Four:
    """out, dq, dk, dv, one sample after the other: dense attention of a pack would not fit."""
    q, k, v, dout = given
    results: Four = (torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    for start, *ends in spans.tolist():
        here = slice(start, ends[-1])
        mask = RoleMask.from_spans(np.array([[0, *(e - start for e in ends)]]), ends[-1] - start).to(q.device)
        q_, k_, v_ = inputs = [x[here].detach().requires_grad_() for x in (q, k, v)]
        out = attend(q_, k_, v_, mask, q.shape[-1] ** -0.5)
        for into, part in zip(results, (out.detach(), *torch.autograd.grad(out, inputs, dout[here])), strict=True):
            into[here] = part
    return results


def eager(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float) -> Tensor:
    """Attention that rounds every intermediate to the inputs' dtype: the error a user would accept."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, T, D)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask.dense, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


@contextmanager
def poisoned(device: torch.device, most_bytes: int = 2 * 2**30) -> Iterator[None]:
    """Memory that torch.empty gives out inside holds NaN.

    CUDA: freed memory of the allocator is filled beforehand, with 0x7FFF, NaN in every float. CPU: torch fills it.
    """
    if device.type != "cuda":
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # or the allocator would hand out older, clean blocks
    small = [torch.full((2**18,), 0x7FFF, dtype=torch.int16, device=device) for _ in range(32)]
    large = torch.full((most_bytes // 2,), 0x7FFF, dtype=torch.int16, device=device)
    del small, large
    yield
    torch.cuda.synchronize(device)
