"""flash-attention's own rule, on O, dQ, dK and dV: at most twice the error of eager attention in the same dtype.

    max|x - ref32| <= 2 max|eager - ref32| + 2 max|(ref + 0.3 - 0.3) - ref|

Outputs are poisoned: what a kernel does not write is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prts_kernels.role_attention import RoleMask
from prts_kernels.role_attention import reference as specification

NAMES = ("out", "dq", "dk", "dv")
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Correctness:
    """By name of NAMES: the error found and the rule's limit. ok: every error is within its limit."""

    errors: dict[str, float]
    limits: dict[str, float]

    @property
    def ok(self) -> bool:
        return all(self.errors[n] <= self.limits[n] for n in self.errors)  # False where the error is NaN

    @property
    def why(self) -> str:
        over = [f"{n} {self.errors[n]:.3g} > {self.limits[n]:.3g}" for n in self.errors if not self._within(n)]
        return f"wrong by the rule: {', '.join(over)}" if over else ""

    def _within(self, name: str) -> bool:
        return self.errors[name] <= self.limits[name]


@dataclass(frozen=True)
class Yardstick:
    """For one set of inputs: the result in fp32, and by name how far off one may be."""

    exact: Four
    limits: dict[str, float]

    @classmethod
    def of(cls, spans: np.ndarray, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Yardstick:
        scale = q.shape[-1] ** -0.5
        exact = by_sample(spans, specification.forward, scale, q.float(), k.float(), v.float(), dout.float())
        rough = by_sample(spans, eager, scale, q, k, v, dout)
        limits = {}
        for name, right, low in zip(NAMES, exact, rough, strict=True):
            narrow = right.to(low.dtype)
            rounding = ((narrow + 0.3 - 0.3).float() - narrow.float()).abs().max()
            limits[name] = float(2 * (low.float() - right).abs().max() + 2 * rounding)
            limits[name] += 1e-5 * (q.dtype == torch.float32)  # sums in another order
        return cls(exact, limits)

    def judge(self, found: Four) -> Correctness:
        errors = {}
        for name, x, right in zip(NAMES, found, self.exact, strict=True):
            error = float((x.float() - right).abs().max())
            errors[name] = error if math.isfinite(error) else math.nan
        return Correctness(errors, self.limits)


def by_sample(
    spans: np.ndarray,
    attend: Callable[[Tensor, Tensor, Tensor, RoleMask, float], Tensor],
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
) -> Four:
    """out, dq, dk, dv, one sample after the other: dense attention of a pack would not fit."""
    results: Four = (torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    for start, *ends in spans.tolist():
        here = slice(start, ends[-1])
        mask = RoleMask.from_spans(np.array([[0, *(e - start for e in ends)]]), ends[-1] - start).to(q.device)
        q_, k_, v_ = inputs = [x[here].detach().requires_grad_() for x in (q, k, v)]
        out = attend(q_, k_, v_, mask, scale)
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
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # or the allocator would hand out older, clean blocks
    small = [torch.full((2**18,), 0x7FFF, dtype=torch.int16, device=device) for _ in range(32)]
    large = torch.full((most_bytes // 2,), 0x7FFF, dtype=torch.int16, device=device)
    del small, large
    yield
    torch.cuda.synchronize(device)
