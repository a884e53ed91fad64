"""Jobs that find the fastest tiles of the Triton kernels: compile and check each candidate, then time them.

It knows triton.py's candidates and single-kernel entries, and nothing of what tiles mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prts_kernels.bench import packs
from prts_kernels.bench.packs import Shape
from prts_kernels.bench.probe import cell_pack
from prts_kernels.bench.timing import FAILURES, TimingPlan, measure, one_line
from prts_kernels.bench.worker import Emit
from prts_kernels.role_attention import triton as ours

TOLERANCE = 0.02  # of the largest value; tiles change the order of sums, never more


def candidates(head_dim: int) -> list[tuple[str, int]]:
    """(kernel, number of the candidate) of all of them."""
    return [(kernel, i) for kernel in ours.KERNELS for i in range(len(ours.CANDIDATES[kernel][head_dim]))]


def compile_one(arguments: dict[str, Any], emit: Emit) -> None:
    """One candidate: compiled, which fills the cache on disk, run, and compared with the first candidate's result.

    arguments: cell, device, seed, kernel, number. Emits {"kernel", "number", "tile", "ok", "why"}.
    """
    kernel, number = arguments["kernel"], arguments["number"]
    kernels = _Kernels.of(arguments)
    tile = list(astuple(kernels.tile(kernel, number)))
    line: dict[str, Any] = {"kernel": kernel, "number": number, "tile": tile, "head_dim": kernels.q.shape[2]}
    try:
        found, right = kernels.run(kernel, number), kernels.run(kernel, 0)
        pairs = zip(found, right, strict=True)
        off = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
        line |= {"ok": off <= TOLERANCE, "why": "" if off <= TOLERANCE else f"{off:.2g} off the first candidate"}
    except FAILURES as err:
        line |= {"ok": False, "why": one_line(err)}
    emit(line)


def time_all(arguments: dict[str, Any], emit: Emit) -> None:
    """Every candidate of `passed`, [kernel, number] pairs, in turns: a line {"kernel", "tile", "median_ms"} each.

    arguments: cell, device, seed, plan, passed.
    """
    kernels = _Kernels.of(arguments)
    for kernel in ours.KERNELS:
        calls: dict[str, list[Callable[[], object]]] = {}
        for name, number in arguments["passed"]:
            if name == kernel:
                calls[str(number)] = [lambda kernel=kernel, number=number: kernels.run(kernel, number)]  # type: ignore[misc]
        emit({"turn": kernel})
        timings, failed = measure(calls, kernels.q.device, TimingPlan(**arguments["plan"]))
        for number, timing in timings.items():
            tile = list(astuple(kernels.tile(kernel, int(number))))
            emit({"kernel": kernel, "tile": tile, "median_ms": timing.median_ms, "p80_ms": timing.p80_ms})
        for number, why in failed.items():
            emit({"kernel": kernel, "tile": list(astuple(kernels.tile(kernel, int(number)))), "failed": why})


@dataclass
class _Kernels:
    """The three kernels on one pack; what a later kernel needs of an earlier one comes from its first candidate."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Any

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Kernels:
        device, shape = torch.device(arguments["device"]), Shape(**arguments["cell"]["shape"])
        pack = cell_pack(arguments["cell"], arguments["seed"])
        return cls(*packs.tensors(pack, shape, device, arguments["seed"]), pack.mask(device))

    def tile(self, kernel: str, number: int) -> ours.Blocks:
        return ours.CANDIDATES[kernel][self.q.shape[2]][number]

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        return self._forward(0)

    @cached_property
    def delta(self) -> Tensor:
        return self._dq(0)[1]

    def run(self, kernel: str, number: int) -> tuple[Tensor, ...]:
        return {"forward": self._forward, "dq": self._dq, "dkdv": self._dkdv}[kernel](number)

    def _forward(self, number: int) -> tuple[Tensor, Tensor]:
        return ours.run_forward(self.q, self.k, self.v, self.mask, self.scale, self.tile("forward", number))

    def _dq(self, number: int) -> tuple[Tensor, Tensor]:
        out, lse = self.forward
        tile = self.tile("dq", number)
        return ours.run_dq(self.q, self.k, self.v, out, self.dout, lse, self.mask, self.scale, tile)

    def _dkdv(self, number: int) -> tuple[Tensor, Tensor]:
        lse, tile = self.forward[1], self.tile("dkdv", number)
        return ours.run_dkdv(self.q, self.k, self.v, self.dout, lse, self.delta, self.mask, self.scale, tile)
