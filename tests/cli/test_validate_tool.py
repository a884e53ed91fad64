"""`prts validate FOLDER`: what it prints, its exit status, the seal and the repaired copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prts_core.cli.main import main
from prts_core.data.lerobot_v21.seal import SEAL
from tests.data.conftest import Converted, convert_toy, write_raw


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("validate")
    return convert_toy(folder, write_raw(folder / "raw", {"wave": "wave"}, train=2, heldout=1))


@pytest.fixture
def foreign(tmp_path: Path, made: Converted) -> Path:
    """As others write it: no Contract, no seal."""
    shutil.copytree(made.root, tmp_path / "data", ignore=shutil.ignore_patterns("prts_manifest.json", "contract.json"))
    return tmp_path / "data"


def test_foreign_dataset_is_validated_and_sealed(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(foreign)]) == 0
    shown = capsys.readouterr().out
    assert "sound, 2 warnings" in shown and "content unverified" in shown
    assert main(["validate", str(foreign), "--seal", "--video", "packets"]) == 0
    assert (foreign / SEAL).is_file() and "sealed:" in capsys.readouterr().out
    tasks = foreign / "meta/episodes.jsonl"
    tasks.write_text(tasks.read_text().replace('"seed": ', '"seed": 1', 1))
    assert main(["validate", str(foreign), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(f["check"], f["file"]) for f in report["findings"] if f["severity"] == "error"] == [
        ("seal", "meta/episodes.jsonl")
    ]


def test_faults_are_named_not_sealed_and_fixed(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    next(foreign.rglob("episode_000001.mp4")).unlink()
    assert main(["validate", str(foreign), "--seal"]) == 1
    assert "not sealed" in capsys.readouterr().out and not (foreign / SEAL).exists()
    assert main(["validate", str(foreign), "--fix", str(tmp_path / "out")]) == 0
    assert "episode 1 left out" in capsys.readouterr().out
    assert (tmp_path / "out" / SEAL).is_file() and (tmp_path / "out/meta/quarantine.jsonl").is_file()
    assert main(["validate", str(foreign), "--fix", str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--json"]) == 1 and "needs a dataset" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "none")]) == 1 and "folder is missing" in capsys.readouterr().err
