"""`prts bench info_nce`: the contrastive loss of a large batch, in chunks against whole matrices of scores.

The measurement itself is the kernels' own (`kernels/bench/info_nce.py`); this puts it into the project's rows.
"""

from __future__ import annotations

import torch
from rich.console import Console

from prts_core.bench.report import Row

SIZES = {"cpu": (1024, 4096), "cuda": (8192, 32768)}


def run(console: Console) -> list[Row]:
    from prts_kernels.bench import info_nce

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = info_nce.run(device, SIZES[device], info_nce.EMBED_DIM, 300.0)
    console.print(info_nce.table(results), highlight=False)
    rows = []
    for found in results["rows"]:
        count, times, memory = found["samples"], found["time"], found["memory_mb"]
        if len(times) == 2:
            ours, peer = (times[impl]["median_ms"] for impl in (info_nce.OURS, info_nce.PEER))
            rows.append(Row(f"{count} samples: step, chunks / matrices", ours, peer, "ms", "lower", "<= 1.05"))
        if len(memory) == 2:
            ours, peer = (memory[impl] for impl in (info_nce.OURS, info_nce.PEER))
            rows.append(Row(f"{count} samples: extra memory", ours, peer, "MB", "lower", "<= 0.5"))
    return rows
