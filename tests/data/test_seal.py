"""The seal: deterministic, made by every writer, and no changed byte gets past it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prts_core.data.lerobot_v21.seal import SEAL, check_sizes, compare, files_of, read_seal, seal
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import DataError
from prts_core.io.files import digest_file, read_json, write_json
from tests.data.conftest import Converted

TABLE = "data/chunk-000/episode_000001.parquet"


@pytest.fixture
def sealed(tmp_path: Path, toy: Converted) -> Path:
    return Path(shutil.copytree(toy.root, tmp_path / "data"))


def test_what_we_write_is_sealed_and_the_seal_is_deterministic(sealed: Path) -> None:
    entries = read_seal(sealed)
    assert entries is not None and list(entries) == files_of(sealed) and SEAL not in entries
    assert entries[TABLE].sha256 == digest_file(sealed / TABLE).removeprefix("sha256:")
    before = (sealed / SEAL).read_bytes()
    (sealed / SEAL).unlink()
    (sealed / ".DS_Store").write_text("no part of the dataset")
    seal(sealed, workers=3)
    assert (sealed / SEAL).read_bytes() == before and validate_dataset(sealed).findings == []


def test_sizes_are_compared_where_a_dataset_is_opened_for_training(sealed: Path) -> None:
    check_sizes(sealed)
    path = sealed / TABLE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    check_sizes(sealed)  # same size: only validation reads bytes
    assert [(d.path, d.fault) for d in compare(sealed, read_seal(sealed) or {})] == [(TABLE, "content")]
    path.write_bytes(b"short")
    with pytest.raises(DataError, match=r"changed since it was sealed.*episode_000001.*5 bytes.*--seal"):
        check_sizes(sealed)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        check_sizes(sealed)
    (sealed / SEAL).unlink()
    check_sizes(sealed)


def test_a_changed_byte_is_an_error_and_an_extra_file_a_warning(sealed: Path) -> None:
    text = (sealed / "meta/tasks.jsonl").read_text()
    (sealed / "meta/tasks.jsonl").write_text(text.replace("faucet", "faucat"))
    shutil.copy(sealed / TABLE, sealed / "meta/copy.parquet")
    report = validate_dataset(sealed, "packets")
    assert ("seal", "meta/tasks.jsonl") in {(f.check, f.file) for f in report.errors}
    assert [f.file for f in report.warnings] == ["meta/copy.parquet"]


@pytest.mark.parametrize("fault", ["edited", "outside", "list", "twice"])
def test_a_manifest_that_was_edited_verifies_nothing(sealed: Path, fault: str) -> None:
    raw = read_json(sealed / SEAL)
    if fault == "edited":
        raw["files"][0]["size"] += 1
    elif fault == "outside":
        raw["files"][0]["path"] = "../../etc/passwd"
    elif fault == "twice":
        raw["files"].append(raw["files"][0])
    write_json(sealed / SEAL, [] if fault == "list" else raw)
    with pytest.raises(DataError, match=r"manifest is"):
        read_seal(sealed)
    assert [f.file for f in validate_dataset(sealed, "packets").errors] == [SEAL]


def test_without_a_seal_the_content_is_unverified(sealed: Path) -> None:
    (sealed / SEAL).unlink()
    report = validate_dataset(sealed, "packets")
    assert report.ok and ["content unverified" in f.found for f in report.warnings] == [True]
