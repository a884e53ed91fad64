"""The validation benchmark measures what it says: a sound, sealed dataset, and videos of which nothing is decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from prts_core.bench import data_validation
from prts_core.data.validation import validate_dataset, videos


def test_the_dataset_is_sound_and_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_validation, "ROWS", 40)
    root = data_validation.make(tmp_path, 3)
    assert validate_dataset(root).findings == []
    monkeypatch.setattr(videos, "_luma", None)  # decoding would call it
    report = validate_dataset(root, "packets")
    assert report.findings == [] and report.checks["videos"] == 6 and report.checks["seal"] == 14


def test_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_validation, "EPISODES", 2)
    monkeypatch.setattr(data_validation, "ROWS", 40)
    (row,) = data_validation.rows(Console(quiet=True))
    assert row.unit == "ms/episode" and row.peer == data_validation.GOAL_MS and row.ours > 0
