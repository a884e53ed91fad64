"""Fixtures of the stage runner's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prts_core.stages import base

sys.path.insert(0, str(Path(__file__).parent))
from tiny_chain import Chain, untracked


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setattr(base, "stage_run", untracked)
    return Chain(tmp_path / "outputs")
