"""`prts bench info_nce`: the contrastive loss of a large batch, in chunks against whole matrices (kernels/bench)."""

from __future__ import annotations

from rich.console import Console

from prts_core.bench.kernels import kernel_rows
from prts_core.bench.report import Row


def run(console: Console) -> list[Row]:
    """About a minute on a CPU."""
    return kernel_rows("info_nce")
