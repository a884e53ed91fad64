"""Name what is timed: every implementation of role_attention, and what computes plain causal attention beside it.

Shapes as in role_attention: q (T, Hq, D), k and v (T, Hkv, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from packs import Pack, Shape
from prts_kernels.role_attention import role_attention, varlen
from prts_kernels.role_attention.attention_spec import AttentionSpec
from prts_kernels.role_attention.select import implementation

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Baseline:
    """module: of role_attention; none: torch's or a stock kernel's own attention. peer: plain causal attention over
    whole samples, which the targets compare with. graph: timed as a CUDA graph."""

    module: str | None = None
    backend: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    peer: bool = False
    graph: bool = False

    def unsupported_reason(self, shape: Shape, device: torch.device) -> str | None:
        """Why it cannot compute such tensors here, or None."""
        if device.type not in self.devices:
            return f"it is not timed on {device.type}"
        spec = AttentionSpec(device, (shape.dtype,) * 3, shape.head_dim, of_samples=True, grad=True)
        stock = varlen.BACKENDS.get(self.backend or "")
        reason = stock.unsupported_reason(spec) if stock else None
        if reason is None and self.module not in (None, "auto"):
            reason = implementation(self.module).unsupported_reason(spec)
        if self.backend == "cudnn" and not torch.backends.cudnn.is_available():
            return "torch has no cuDNN"
        return reason


BASELINES = {
    "auto": Baseline("auto", devices=("cpu",)),
    "triton": Baseline("triton"),
    "split fa4": Baseline("split", "fa4"),
    "split fa3": Baseline("split", "fa3"),
    "split fa2": Baseline("split", "fa2"),
    "split torch": Baseline("split", "torch"),
    "split eager": Baseline("split", "eager", devices=("cpu",)),
    "flex": Baseline("flex"),
    "sdpa": Baseline("sdpa"),
    "dense mask": Baseline(devices=("cpu",)),
    "sdpa causal": Baseline(devices=("cpu",), peer=True),
    "fa4 causal": Baseline(backend="fa4", peer=True),
    "fa3 causal": Baseline(backend="fa3", peer=True),
    # torch's operators for cuDNN build its plan anew in every call, on the host.
    "cudnn causal": Baseline(backend="cudnn", peer=True, graph=True),
}


@dataclass(frozen=True)
class Differentiated:
    """As a model uses it: through autograd."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return q, k, v, self.attend(q, k, v)

    def backward(self, state: Any, dout: Tensor) -> Grads:
        return torch.autograd.grad(state[3], state[:3], dout, retain_graph=True)


@dataclass(frozen=True)
class Raw:
    """A stock kernel called as it is: run_forward(q, k, v) -> state, run_backward(dout, *state) -> dq, dk, dv."""

    run_forward: Callable[..., tuple[Tensor, ...]]
    run_backward: Callable[..., Grads]

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.run_forward(q, k, v)

    @torch.no_grad()
    def backward(self, state: Any, dout: Tensor) -> Grads:
        return self.run_backward(dout, *state)


# One baseline on one pack. A state begins with q, k, v, out; `backward` may be called on it again.
Attend = Differentiated | Raw


def build(name: str, pack: Pack, device: torch.device, head_dim: int) -> Attend:
    baseline, scale, mask = BASELINES[name], head_dim**-0.5, pack.mask(device)
    if baseline.module == "auto":
        return Differentiated(lambda q, k, v: role_attention(q, k, v, mask))
    if baseline.module is not None:
        if baseline.module == "flex":
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False  # else a compiled backward refuses a second run
        given = {"backend": baseline.backend} if baseline.backend else {}
        return Differentiated(partial(implementation(baseline.module).forward, mask=mask, scale=scale, **given))
    if name == "dense mask":
        visible = mask.dense[:, None]
        return Differentiated(lambda q, k, v: _side_by_side(q, k, v, pack.rows, attn_mask=visible))
    if name == "sdpa causal":
        return Differentiated(partial(_sample_by_sample, pack=pack))
    if baseline.backend == "cudnn":
        return _cudnn(*pack.segments(device), scale)
    kernel, bounds = varlen.BACKENDS[baseline.backend or ""], (*pack.segments(device), scale)
    return Raw(
        lambda q, k, v: (q, k, v, *kernel.forward(q, k, v, *bounds)),
        lambda dout, q, k, v, out, lse: kernel.backward(dout, q, k, v, out, lse, *bounds),
    )


def _cudnn(segments: Tensor, longest: int, scale: float) -> Raw:
    """cuDNN's varlen-causal attention through the operators that torch keeps for its nested tensors."""
    bounds, ops = (segments, segments, longest, longest), torch.ops.aten

    def forward(*qkv: Tensor) -> tuple[Tensor, ...]:
        found = ops._cudnn_attention_forward(*qkv, None, *bounds, True, 0.0, True, False, scale=scale)
        return *qkv, found[0], found[1], found[6], found[7]

    def backward(*state: Tensor) -> Grads:
        return ops._cudnn_attention_backward(*state, None, *bounds, 0.0, True, scale=scale)

    return Raw(forward, backward)


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, rows: int, **more: Any) -> Tensor:
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **more).transpose(1, 2).flatten(0, 1)


def _sample_by_sample(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    """One call where every sample fills its row, else one a sample."""
    if len(pack.spans) == pack.rows:
        return _side_by_side(q, k, v, pack.rows, is_causal=True)
    bounds = [(start, end) for start, *_, end in pack.spans.tolist()]
    return torch.cat([_side_by_side(q[a:b], k[a:b], v[a:b], 1, is_causal=True) for a, b in bounds])
