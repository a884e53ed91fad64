"""`prts bench data`: statistics, validation, loading and encoding of datasets beside lerobot, bare PyAV and numpy."""

from __future__ import annotations

from rich.console import Console

from prts_core.bench import (
    data_encoding,
    data_images,
    data_loading,
    data_start,
    data_statistics,
    data_validation,
)
from prts_core.bench.report import Row


def run(console: Console) -> list[Row]:
    """Minutes each, so that rows are told as they come; memory is measured before what fills it."""
    rows: list[Row] = []
    for part in (data_statistics, data_validation, data_images, data_start, data_loading, data_encoding):
        found = part.rows(console)
        for row in found:
            console.print(row.line())
        rows += found
    return rows
