"""The row statistics of `prts bench data`: both sides run, in processes of their own, and mean the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from prts_core.bench import data_statistics
from prts_core.data import statistics


def test_both_sides_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_statistics, "ROWS", 500)
    root = data_statistics.make(tmp_path, 3)
    ours, peer = statistics.compute(root).stats, data_statistics._load_everything(root)
    assert ours.count == 1500
    np.testing.assert_allclose([ours.action.q01, ours.action.q99], peer["action"], rtol=1e-6)


@pytest.mark.slow
def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_statistics, "ROWS", 500)
    monkeypatch.setattr(data_statistics, "_REPEATS", 1)
    speed, memory = data_statistics.rows(Console(quiet=True), 2)
    assert speed.goal == "<= 0.25" and speed.peer and speed.ours > 0
    assert memory.met and memory.peer == 300
