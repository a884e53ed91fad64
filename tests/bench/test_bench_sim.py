"""The simulator's benchmark where LIBERO is not installed, and its slots on a simulator that is always there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from prts_core.bench import sim
from prts_core.sim.pool import THREAD_VARIABLES
from prts_core.sim.suites import suite


def test_without_libero_every_row_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = sim.run(Console(quiet=True))
    assert len(rows) == 4
    assert all(row.peer is None and "prts sim install libero" in row.note for row in rows)
    assert [row.goal for row in rows] == [">= 3.0", ">= 3.0", ">= 1.6", ">= 1.0"]


def test_default_threads_means_that_no_variable_limits_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LP_NUM_THREADS", "1")
    with sim.no_thread_settings(True):
        assert not set(THREAD_VARIABLES) & set(os.environ)
    assert os.environ["LP_NUM_THREADS"] == "1"
    with sim.no_thread_settings(False):
        assert os.environ["LP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_every_lane_goes_through_all_recorded_actions(monkeypatch: pytest.MonkeyPatch):
    spec = suite("metaworld")
    monkeypatch.setattr(sim, "SUITE", "metaworld")
    monkeypatch.setattr(sim, "TASK", spec.tasks[0].name)
    slots = sim.SlotThroughput(2, 1, {})
    try:
        assert slots.steps_per_second(np.zeros((8, len(spec.contract.action)), np.float32), 4) > 0
    finally:
        slots.close()
