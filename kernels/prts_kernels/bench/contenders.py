"""Who is timed: every implementation of role_attention, and plain varlen-causal kernels on the same tokens as peers.

It does not time or check. Shapes as in role_attention: q (T, Hq, D), k and v (T, Hkv, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prts_kernels.bench.packs import Pack
from prts_kernels.role_attention import varlen
from prts_kernels.role_attention.case import Case
from prts_kernels.role_attention.select import implementation

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Contender:
    """group: "ours" computes role attention; "peer" and "shown" plain causal attention over the same samples, of which
    "peer" ones are what the goals compare with. module: of role_attention, or None. graph: timed as a CUDA graph."""

    name: str
    group: str
    module: str | None = None
    backend: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    graph: bool = False
    note: str = ""


CONTENDERS = {
    c.name: c
    for c in (
        Contender("triton", "ours", "triton"),
        Contender("split fa4", "ours", "split", "fa4"),
        Contender("split fa3", "ours", "split", "fa3"),
        Contender("split fa2", "ours", "split", "fa2"),
        Contender("split torch", "ours", "split", "torch"),
        Contender("split eager", "ours", "split", "eager", devices=("cpu",)),
        Contender("flex", "ours", "flex", devices=("cuda", "cpu")),
        Contender("flex flash", "ours", "flex", "FLASH"),
        Contender("sdpa", "ours", "sdpa", devices=("cuda", "cpu")),
        Contender("reference", "ours", "reference", devices=("cpu",)),
        Contender("fa4 causal", "peer", backend="fa4"),
        Contender("fa3 causal", "peer", backend="fa3"),
        Contender("cudnn causal", "peer", backend="cudnn", graph=True, note="torch's kernels for its offsets included"),
        Contender(
            "cudnn causal expanded",
            "peer",
            backend="cudnn",
            graph=True,
            note="K and V copied to as many heads as Q, the copies counted",
        ),
        Contender("fa2 causal", "shown", backend="fa2"),
        Contender("torch causal", "shown", backend="torch"),
        Contender("sdpa causal", "peer", devices=("cpu",), note="one call a sample, is_causal"),
    )
}


class Attend(Protocol):
    """One contender on one pack: what `state` holds is its own business."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any: ...
    def output(self, state: Any) -> Tensor: ...
    def backward(self, state: Any, dout: Tensor) -> Grads:
        """May be called again on the same state."""


def unfit(contender: Contender, q: Tensor) -> str | None:
    """Why the contender cannot compute tensors like q, or None."""
    if q.device.type not in contender.devices:
        return f"it is not timed on {q.device.type}"
    case = Case(q.device, (q.dtype,) * 3, q.shape[-1], True, True)
    stock = "fa4" if contender.backend == "FLASH" else contender.backend
    if stock in varlen.BACKENDS:
        reason = varlen.BACKENDS[stock].unfit(case)
        if reason:
            return reason
    if contender.module is not None:
        return implementation(contender.module).unfit(case)
    if contender.backend == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch has no cuDNN"
    return None


def build(contender: Contender, pack: Pack, device: torch.device, head_dim: int) -> Attend:
    scale = head_dim**-0.5
    if contender.module is not None:
        forward: Callable[..., Tensor] = implementation(contender.module).forward
        given = {"backend": contender.backend} if contender.backend else {}
        if contender.module == "flex":
            _let_backward_run_again()
        mask = pack.mask(device)
        return Differentiated(lambda q, k, v: forward(q, k, v, mask, scale, **given))
    if contender.name == "sdpa causal":
        return Differentiated(lambda q, k, v: _sample_by_sample(q, k, v, pack, scale))
    segments, longest = pack.segments(device)
    if contender.backend == "cudnn":
        return _Cudnn(segments, longest, scale, expand=contender.name.endswith("expanded"))
    assert contender.backend is not None
    return _Stock(varlen.BACKENDS[contender.backend], segments, longest, scale)


def _let_backward_run_again() -> None:
    """Compiled backwards may otherwise write over what they saved, and refuse a second run."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


@dataclass(frozen=True)
class Differentiated:
    """Ours, as a model uses it: through autograd."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (x if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v))
        return self.attend(q, k, v), (q, k, v)

    def output(self, state: Any) -> Tensor:
        return state[0].detach()

    def backward(self, state: Any, dout: Tensor) -> Grads:
        return torch.autograd.grad(state[0], state[1], dout, retain_graph=True)


@dataclass(frozen=True)
class _Stock:
    """A stock varlen kernel, its forward and backward called as they are."""

    kernel: varlen.Backend
    segments: Tensor
    longest: int
    scale: float

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return q, k, v, *self.kernel.forward(q, k, v, self.segments, self.longest, self.scale)

    def output(self, state: Any) -> Tensor:
        return state[3]

    @torch.no_grad()
    def backward(self, state: Any, dout: Tensor) -> Grads:
        q, k, v, out, lse = state
        return self.kernel.backward(dout, q, k, v, out, lse, self.segments, self.longest, self.scale)


@dataclass(frozen=True)
class _Cudnn:
    """cuDNN's varlen-causal attention through the operators that torch keeps for its nested tensors.

    torch.nn.attention.varlen has them too, but switched off. torch builds cuDNN's plan anew in every call (2.11), on
    the host; as a CUDA graph only the device's work is timed.
    """

    segments: Tensor
    longest: int
    scale: float
    expand: bool

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        kv_heads = k.shape[1]
        if self.expand:
            k, v = (x.repeat_interleave(q.shape[1] // kv_heads, dim=1) for x in (k, v))
        found = torch.ops.aten._cudnn_attention_forward(
            q,
            k,
            v,
            None,
            self.segments,
            self.segments,
            self.longest,
            self.longest,
            True,
            0.0,
            True,
            False,
            scale=self.scale,
        )
        return (q, k, v, found[0], found[1]), (found[6], found[7]), kv_heads

    def output(self, state: Any) -> Tensor:
        return state[0][3]

    @torch.no_grad()
    def backward(self, state: Any, dout: Tensor) -> Grads:
        tensors, random_state, kv_heads = state
        dq, dk, dv = torch.ops.aten._cudnn_attention_backward(
            dout,
            *tensors,
            *random_state,
            None,
            self.segments,
            self.segments,
            self.longest,
            self.longest,
            0.0,
            True,
            scale=self.scale,
        )
        if self.expand:
            dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
        return dq, dk, dv


def _sample_by_sample(q: Tensor, k: Tensor, v: Tensor, pack: Pack, scale: float) -> Tensor:
    out = []
    for start, *_, end in pack.spans.tolist():
        q_, k_, v_ = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        found = scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale, enable_gqa=gqa)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)
