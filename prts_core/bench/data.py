"""`prts bench data`: loading, encoding, statistics and validation of datasets beside lerobot, bare PyAV and numpy.

It knows which modules measure and in which order; each has `rows(console) -> list[Row]` and runs its peers itself.
"""

from __future__ import annotations

import importlib

from rich.console import Console

from prts_core.bench.report import Row

# Memory is measured before what fills it.
PARTS = ("data_statistics", "data_validation", "data_loading", "data_encoding")


def run(console: Console) -> list[Row]:
    rows: list[Row] = []
    for part in PARTS:  # minutes each: told as they come
        made = importlib.import_module(f"prts_core.bench.{part}").rows(console)
        for row in made:
            console.print(row.line())
        rows += made
    return rows
