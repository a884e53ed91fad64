"""`prts bench info_nce`: the contrastive loss of a large batch, in chunks against whole matrices of scores; measured by
the kernels' own benchmark (`kernels/bench/info_nce.py`)."""

from __future__ import annotations

import torch
from rich.console import Console

from prts_core.bench.report import Row
from prts_kernels.bench import info_nce

SIZES = {"cpu": (1024, 4096), "cuda": (8192, 32768)}


def run(console: Console) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = info_nce.run(device, SIZES[device], info_nce.EMBED_DIM, 300.0)
    console.print(info_nce.table(results), highlight=False)
    rows = []
    for found in results["rows"]:
        times = {impl: one["median_ms"] for impl, one in found["time"].items()}
        for what, unit, values, goal in (
            ("step, chunks / matrices", "ms", times, "<= 1.05"),
            ("extra memory", "MB", found["memory_mb"], "<= 0.5"),
        ):
            if len(values) == 2:
                ours, peer = values[info_nce.OURS], values[info_nce.PEER]
                rows.append(Row(f"{found['samples']} samples: {what}", ours, peer, unit, "lower", goal))
    return rows
