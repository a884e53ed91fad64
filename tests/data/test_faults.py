"""A full disk and a read-only output while converting: one paragraph, nothing of before is lost, and it goes on."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from prts_core.data.lerobot_v21 import writer
from prts_core.io.errors import StageError
from prts_core.store.listing import digest_tree
from tests.data.conftest import Converted, convert_toy


@pytest.mark.parametrize("small_disk", ["96k"], indirect=True)
def test_full_disk(small_disk: Path, toy: Converted) -> None:
    with pytest.raises(StageError, match=r"disk is full.*MiB free.*Cure: free some space"):
        convert_toy(small_disk, toy.raw)
    assert not (small_disk / "output/meta").exists()
    assert not list(small_disk.rglob("*.partial-*")), "half a file was left"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert digest_tree(convert_toy(small_disk, toy.raw).root) == digest_tree(toy.root)


def test_full_disk_without_a_mount(tmp_path: Path, toy: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = writer.write_parquet, []

    def fails_the_third_time(*args: object, **more: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args, **more)

    monkeypatch.setattr(writer, "write_parquet", fails_the_third_time)
    with pytest.raises(StageError, match="disk is full"):
        convert_toy(tmp_path, toy.raw)
    assert len(list((tmp_path / "episodes").glob("*.json"))) >= 2
    assert digest_tree(convert_toy(tmp_path, toy.raw).root) == digest_tree(toy.root)


def test_read_only_output(tmp_path: Path, toy: Converted) -> None:
    done = convert_toy(tmp_path, toy.raw)
    before = digest_tree(done.root)
    (tmp_path / "episodes/000001.json").unlink()
    command = ["mount", "--bind", "-o", "ro", str(tmp_path), str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:  # root writes everywhere but to a read-only mount
        if os.geteuid() == 0:
            pytest.skip("neither a read-only mount nor permissions can stop this user")
        folder = tmp_path / "output/videos/chunk-000/observation.images.top"
        folder.chmod(0o500)
        undo = ["chmod", "700", str(folder)]
    else:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
        undo = ["umount", "-l", str(tmp_path)]
    try:
        with pytest.raises(StageError, match=r"cannot be written; what was there before is untouched.*Cure"):
            convert_toy(tmp_path, toy.raw)
        assert digest_tree(done.root) == before
    finally:
        subprocess.run(undo, check=True)
