"""The benchmark of pictures in tables, at toy size: it runs, and says what a row group of others costs."""

from __future__ import annotations

import pytest
from rich.console import Console

from prts_core.bench import data_images


def test_runs_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LENGTH": 40, "SIDE": 16, "ROUNDS": 1, "ITEMS": 4}.items():
        monkeypatch.setattr(data_images, name, value)
    ours, others = data_images.rows(Console(quiet=True))
    assert min(ours.ours, others.ours) > 0 and "as others write them" in others.what
