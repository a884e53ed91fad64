"""`prts bench attention`: role-aware attention beside plain causal attention over the same tokens (kernels/bench)."""

from __future__ import annotations

from rich.console import Console

from prts_core.bench.kernels import kernel_rows
from prts_core.bench.report import Row


def run(console: Console) -> list[Row]:
    """About 8 minutes on a GPU, one on a CPU."""
    return kernel_rows("role_attention")
