"""Fixtures of the store's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.toy_chain import Chain


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "outputs")
