"""Fixtures of the stage runner's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.stages import base
from tests.stages.tiny_chain import Chain, untracked


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setattr(base, "stage_run", untracked)
    return Chain(tmp_path / "outputs")
