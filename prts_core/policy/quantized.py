"""Hold a policy's backbone in few bits: NF4 (bitsandbytes), int8 by rows, or plain bf16; the action head stays in bf16.

A quantised policy folder has quantization.json, and in the place of a matrix `weight` its numbers `packed` and their
scales `absmax`. Only weights are quantised: sums are taken in bf16. Tables of words, norms and everything outside the
backbone are not touched: an action head in four bits costs the most and saves the least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prts_core.io.errors import CheckpointError, require
from prts_core.io.files import read_json

FILE = "quantization.json"
Scheme = Literal["nf4", "int8", "bf16"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
BACKBONE = ("visual.", "language_model.")
VALUE = "crl_"  # the value's heads, which stay in fp32
PACKED, ABSMAX = "packed", "absmax"
BLOCK = 64  # numbers that share a scale in NF4
KIND = {"nf4": torch.uint8, "int8": torch.int8}


class _Packed(nn.Module):
    """A linear layer that holds its matrix in few bits. packed, absmax: by the scheme."""

    def __init__(self, linear: nn.Linear, packed: tuple[int, ...], absmax: tuple[int, ...], kind: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: Tensor
        self.absmax: Tensor
        self.register_buffer(PACKED, torch.empty(packed, dtype=kind, device="meta"))
        self.register_buffer(ABSMAX, torch.empty(absmax, dtype=torch.float32, device="meta"))
        self.bias = linear.bias


class Nf4Linear(_Packed):
    def __init__(self, linear: nn.Linear) -> None:
        count = linear.in_features * linear.out_features
        super().__init__(linear, (-(-count // 2), 1), (-(-count // BLOCK),), torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        bnb: Any = require("bitsandbytes", "nf4")
        shape = torch.Size((self.out_features, self.in_features))
        state = bnb.functional.QuantState(
            self.absmax, shape, _code(x.device), blocksize=BLOCK, quant_type="nf4", dtype=x.dtype
        )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.device.type == "cpu":  # where bitsandbytes' own product would fetch compiled code from the hub
            return F.linear(x, bnb.functional.dequantize_4bit(self.packed, state), bias)
        out: Tensor = bnb.matmul_4bit(x, self.packed.t(), quant_state=state, bias=bias)
        return out


class Int8Linear(_Packed):
    def __init__(self, linear: nn.Linear) -> None:
        rows = linear.out_features
        super().__init__(linear, (rows, linear.in_features), (rows, 1), torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed.to(x.dtype) * (self.absmax / 127).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {"nf4": Nf4Linear, "int8": Int8Linear}


@cache
def _code(device: torch.device) -> Tensor:
    bnb: Any = require("bitsandbytes", "nf4")
    made: Tensor = bnb.functional.get_4bit_type("nf4", device=device)
    return made


def matrices(model: nn.Module) -> Iterator[str]:
    """Names of the backbone's linear layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(BACKBONE):
            yield name


def pack(weights: Mapping[str, Tensor], names: list[str], scheme: Scheme) -> dict[str, Tensor]:
    """The weights of a policy with those matrices packed, and everything else but the value's heads in bf16."""
    matrix = {f"{name}.weight" for name in names} if scheme in LAYERS else set()
    out: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key in matrix:
            parent = key.removesuffix("weight")
            out[parent + PACKED], out[parent + ABSMAX] = _PACK[scheme](tensor.float())
        else:
            out[key] = tensor if key.startswith(VALUE) or not tensor.is_floating_point() else tensor.bfloat16()
    return out


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    bnb: Any = require("bitsandbytes", "nf4")
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax.float()


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    absmax = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / absmax * 127).round().to(torch.int8), absmax


_PACK = {"nf4": _nf4, "int8": _int8}


def read_scheme(folder: Path) -> Scheme | None:
    """How a policy folder's backbone is held; none where it is not quantised."""
    path = folder / FILE
    if not path.is_file():
        return None
    raw = read_json(path)
    scheme = raw.get("scheme") if isinstance(raw, dict) else None
    if scheme not in SCHEMES:
        raise CheckpointError(
            "A policy is quantised in a way that is not known here",
            file=path,
            field="scheme",
            found=scheme,
            expected=", ".join(SCHEMES),
        )
    return scheme


def hold(model: nn.Module, scheme: Scheme | None) -> None:
    """Put layers that hold their matrices in few bits in the place of the backbone's; they have no memory yet."""
    if scheme not in LAYERS:
        return
    for name in [*matrices(model)]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LAYERS[scheme](model.get_submodule(name)))  # type: ignore[arg-type]


def dtype_of(name: str, scheme: Scheme | None) -> torch.dtype | None:
    """Of a tensor that `pack` has made; none for any other."""
    leaf = name.rpartition(".")[2]
    if scheme is None or leaf not in (PACKED, ABSMAX):
        return None
    return KIND[scheme] if leaf == PACKED else torch.float32


def require_plain_head(model: nn.Module) -> None:
    """CheckpointError where a number outside the backbone is held in few bits."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    few = [name for name, one in tensors if not name.startswith(BACKBONE) and one.dtype in KIND.values()]
    if few:
        raise CheckpointError(
            "The action head of a quantised policy is held in few bits",
            field=few[0],
            found=f"{len(few)} tensors in uint8 or int8",
            expected="bf16",
            cure="quantise it again with `prts skill quantize`",
        )


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, as they are held."""
    return sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
