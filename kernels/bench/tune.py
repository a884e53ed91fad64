"""Find the fastest tiles of the Triton kernels on this device: run, compare and time each candidate."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import milliseconds
from packs import Shape, random_pack, tensors
from prts_kernels.role_attention import triton as ours
from prts_kernels.role_attention.triton import KernelTile

TOLERANCE = 0.02  # of the largest value; tiles change the order of sums, never more


def fastest_tiles(device: torch.device, seed: int, quick: bool, head_dim: str) -> dict[str, Any]:
    """{"tiles": {kernel: the numbers of its fastest KernelTile}, "refused": {candidate: reason}}."""
    shape, total = Shape(head_dim=int(head_dim)), 1024 if quick else 32768
    pack = random_pack(total, 771, np.random.default_rng(seed))
    q, k, v, dout = tensors(pack, shape, device, seed)
    mask, scale = pack.mask(device), shape.head_dim**-0.5
    candidates = {kernel: ours.CANDIDATES[kernel][shape.head_dim] for kernel in ours.KERNELS}
    # What a later kernel needs of an earlier one comes from its first candidate.
    out, lse = ours.run_forward(q, k, v, mask, scale, candidates["forward"][0])
    delta = ours.run_dq(q, k, v, out, dout, lse, mask, scale, candidates["dq"][0])[1]

    def run(kernel: str, tile: KernelTile) -> tuple[Tensor, ...]:
        if kernel == "forward":
            return ours.run_forward(q, k, v, mask, scale, tile)
        if kernel == "dq":
            return ours.run_dq(q, k, v, out, dout, lse, mask, scale, tile)
        return ours.run_dkdv(q, k, v, dout, lse, delta, mask, scale, tile)

    tiles: dict[str, list[int]] = {}
    refused: dict[str, str] = {}
    for kernel, each in candidates.items():
        right, times = run(kernel, each[0]), {}
        for tile in each:
            name = f"{kernel} {astuple(tile)}"
            try:
                pairs = zip(run(kernel, tile), right, strict=True)
                off = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
                if off <= TOLERANCE:
                    times[tile] = milliseconds(partial(run, kernel, tile), device, 20.0)
                else:
                    refused[name] = f"{off:.2g} off the first candidate"
            except Exception as err:  # noqa: BLE001  Triton's own errors have no common base: too many registers, ...
                refused[name] = f"{type(err).__name__}: {err}"[:200]
        tiles[kernel] = list(astuple(min(times, key=lambda tile: times[tile])))
    return {"tiles": tiles, "refused": refused}
