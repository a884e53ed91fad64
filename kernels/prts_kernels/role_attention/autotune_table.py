"""Read the autotune table: by device, the order in which impl="auto" tries implementations, and tuned tile sizes.

The table is measured.json beside this file; `kernels/bench/role_attention.py --record` writes an entry into it:
{"device", "torch", "triton", "date", "order": {head_dim: [impl, ...]}, "tiles": {head_dim: {kernel: [...]}}}.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from prts_kernels.role_attention.attention_spec import AttentionSpec, device_name

PATH = Path(__file__).with_name("measured.json")
UNMEASURED = ("flex", "sdpa")  # on CUDA; elsewhere sdpa alone


@cache
def table() -> dict[str, Any]:
    """Entries by device name, as torch.cuda.get_device_name gives it; "cpu" for any processor."""
    return json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}


def order(spec: AttentionSpec) -> tuple[tuple[str, ...], str]:
    """Implementations, fastest first, and where that order comes from, in words. Always ends in "sdpa"."""
    entry = table().get(device_name(spec.device), {})
    if "order" not in entry:
        names = UNMEASURED if spec.device.type == "cuda" else ("sdpa",)
        return names, f"nothing measured on {device_name(spec.device)} yet"
    nearest = min(entry["order"], key=lambda size: abs(int(size) - spec.head_dim))
    return (*entry["order"][nearest], "sdpa"), f"measured {entry['date']}"


def tiles(device: str, head_dim: int) -> dict[str, list[int]] | None:
    """Tuned tiles of the Triton kernels, {kernel: the numbers of a KernelTile}, or None where nothing was tuned."""
    return table().get(device, {}).get("tiles", {}).get(str(head_dim))
