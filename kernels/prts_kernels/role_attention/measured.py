"""What has been measured, by device: the order in which impl="auto" tries implementations, and tuned tile sizes.

The table is measured.json beside this file; `kernels/bench/role_attention.py --record` writes an entry into it. It does
not measure. An entry: {"device", "torch", "triton", "date", "order": {head_dim: [impl, ...]}, "blocks": {...}}.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("measured.json")
# Where nothing has been measured. CUDA: stock Hopper kernels reach 584 TFLOP/s, Triton about 0.76 of that, Flex 0.46
# (published, H100, causal documents of 32k tokens); `split` without a Hopper kernel refuses and is passed over.
UNMEASURED = {"cuda": ("split", "triton", "flex", "sdpa"), "cpu": ("sdpa",)}


@cache
def table() -> dict[str, Any]:
    """Entries by device name, as torch.cuda.get_device_name gives it; "cpu" for any processor."""
    return json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}


@cache
def order(device: str, head_dim: int) -> tuple[tuple[str, ...], str]:
    """Implementations, fastest first, and where that order comes from, in words. Always ends in "sdpa"."""
    entry = table().get(device)
    if entry is None:
        prior = UNMEASURED["cpu" if device == "cpu" else "cuda"]
        return prior, f"nothing measured on {device} yet, order by published rates"
    by_size: dict[str, list[str]] = entry["order"]
    nearest = min(by_size, key=lambda size: abs(int(size) - head_dim))
    names = [n for n in by_size[nearest] if n != "reference"]
    return (*names, *(["sdpa"] if "sdpa" not in names else [])), f"measured {entry['date']}"


def blocks(device: str, head_dim: int) -> dict[str, list[int]] | None:
    """Tuned tiles of the Triton kernels, {kernel: the numbers of a triton.Blocks}, or None where nothing was tuned."""
    entry = table().get(device, {})
    return entry.get("blocks", {}).get(str(head_dim))
