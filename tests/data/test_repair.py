"""Repair: a new, sound, sealed dataset; the faulty one untouched; what cannot be saved is listed with its reasons."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import repair as repair_module
from prts_core.data.validation import validate_dataset
from prts_core.data.validation.repair import QUARANTINE, renumbered, repair
from prts_core.io.errors import DataError
from prts_core.io.files import read_json, read_jsonl, write_json, write_jsonl
from prts_core.store.listing import digest_tree
from tests.data.conftest import Converted

TABLE = "data/chunk-000/episode_{:06d}.parquet"
VIDEO = "videos/chunk-000/observation.images.{}/episode_{:06d}.mp4"


@pytest.fixture
def faulty(tmp_path: Path, toy: Converted) -> Path:
    shutil.copytree(toy.root, tmp_path / "faulty", ignore=shutil.ignore_patterns("prts_manifest.json"))
    return tmp_path / "faulty"


def test_mechanical_faults_are_put_right_and_the_source_stays(faulty: Path, toy: Converted, tmp_path: Path) -> None:
    info = read_json(faulty / "meta/info.json")
    write_json(faulty / "meta/info.json", info | {"total_frames": 5, "total_videos": 0, "splits": {"train": "0:99"}})
    stats = read_jsonl(faulty / "meta/episodes_stats.jsonl")
    del stats[2]
    write_jsonl(faulty / "meta/episodes_stats.jsonl", stats)
    rows = read_jsonl(faulty / "meta/episodes.jsonl")
    rows[1]["length"] = 99
    write_jsonl(faulty / "meta/episodes.jsonl", rows)
    shuffled = pq.read_table(faulty / TABLE.format(0)).take(pa.array(np.random.default_rng(0).permutation(12)))
    pq.write_table(shuffled, faulty / TABLE.format(0))
    wrong = pq.read_table(faulty / TABLE.format(3))
    pq.write_table(
        wrong.set_column(wrong.column_names.index("index"), "index", pa.array([7] * len(wrong))),
        faulty / TABLE.format(3),
    )  #
    before = digest_tree(faulty)
    done = "\n".join(repair(faulty, tmp_path / "out"))
    assert digest_tree(faulty) == before
    report = validate_dataset(tmp_path / "out")
    assert report.findings == [], report.markdown()
    ours, theirs = LeRobotDataset.open(tmp_path / "out"), LeRobotDataset.open(toy.root)
    assert not (tmp_path / "out" / QUARANTINE).exists() and ours.rows == theirs.rows
    for episode in range(6):
        for key in ("action", "observation.state", "index", "timestamp", "task_index"):
            assert np.array_equal(ours.columns(episode, [key])[key], theirs.columns(episode, [key])[key])
    for said in ("total_frames 5 becomes", "rows put back into order", "length 13", "episode 2: statistics written"):
        assert said in done
    new = read_jsonl(tmp_path / "out/meta/episodes_stats.jsonl")[2]["stats"]
    old = read_jsonl(toy.root / "meta/episodes_stats.jsonl")[2]["stats"]
    assert set(new) == set(old) and np.allclose(new["action"]["mean"], old["action"]["mean"])
    image = "observation.images.top"  # of decoded pictures: close to those before encoding
    assert np.allclose(new[image]["mean"], old[image]["mean"], atol=0.02)


@pytest.mark.parametrize("link", ["copy", "hardlink"])
def test_episodes_that_cannot_be_saved_are_listed(faulty: Path, toy: Converted, tmp_path: Path, link: str) -> None:
    (faulty / VIDEO.format("top", 1)).unlink()
    path = faulty / TABLE.format(4)
    path.write_bytes(path.read_bytes()[:300])
    write_json(faulty / "meta/norm_stats.json", {})
    (faulty / "README.md").write_text("card")
    done = repair(faulty, tmp_path / "out", link=link)  # type: ignore[arg-type]
    report = validate_dataset(tmp_path / "out")
    assert report.findings == [], report.markdown()
    made = LeRobotDataset.open(tmp_path / "out")
    assert len(made.rows) == 4 and made.info.splits == {"train": "0:3", "heldout": "3:4"}
    assert np.array_equal(made.actions(1), LeRobotDataset.open(toy.root).actions(2))
    listed = read_jsonl(tmp_path / "out" / QUARANTINE)
    assert [row["episode_index"] for row in listed] == [1, 4]
    assert "missing" in listed[0]["reasons"][0]["found"] and listed[1]["reasons"][0]["check"] == "tables"
    assert (tmp_path / "out/README.md").read_text() == "card" and not (tmp_path / "out/meta/norm_stats.json").exists()
    assert any("norm_stats.json left out" in line for line in done)
    video = VIDEO.format("wrist", 0)
    assert (faulty / video).samefile(tmp_path / "out" / video) == (link == "hardlink")


def test_changed_bytes_of_a_sealed_dataset_are_not_passed_on(toy: Converted, tmp_path: Path) -> None:
    faulty = Path(shutil.copytree(toy.root, tmp_path / "faulty"))
    table = pq.read_table(faulty / TABLE.format(2))
    action = np.array(table.column("action").to_pylist(), np.float32) + 1  # sound by every other law
    cells = pa.FixedSizeListArray.from_arrays(pa.array(action.ravel()), 4)
    place = table.column_names.index("action")
    pq.write_table(
        table.set_column(place, table.schema.field(place), cells.cast(table.schema.field(place).type)),
        faulty / TABLE.format(2),
    )  #
    repair(faulty, tmp_path / "out")
    assert [row["episode_index"] for row in read_jsonl(tmp_path / "out" / QUARANTINE)] == [2]


def test_a_cut_repair_goes_on_and_leaves_no_half(faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (faulty / TABLE.format(5)).unlink()
    repair(faulty, tmp_path / "whole")
    real, calls = repair_module.take_file, []

    def dies(*args: object) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(repair_module, "take_file", dies)
    with pytest.raises(KeyboardInterrupt):
        repair(faulty, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(repair_module, "take_file", real)
    repair(faulty, tmp_path / "cut")
    assert digest_tree(tmp_path / "cut") == digest_tree(tmp_path / "whole")


def test_what_is_refused(faulty: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="never repaired in place"):
        repair(faulty, faulty / "fixed")
    with pytest.raises(DataError, match="exists already"):
        repair(faulty, tmp_path)
    shutil.rmtree(faulty / "videos")
    with pytest.raises(DataError, match="No episode can be saved"):
        repair(faulty, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (faulty / "meta/info.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        repair(faulty, tmp_path / "out")


class Sentence(str):
    """A sentence that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Sentence.compared += 1
        return str.__eq__(self, other)


def test_tasks_are_numbered_in_one_pass() -> None:
    tasks = {2 * n: Sentence(f"task {n % 1500}") for n in range(2000)}
    Sentence.compared = 0
    new = renumbered(dict(tasks))
    assert Sentence.compared <= len(tasks)  # one for each that is there already; a search of a list takes a million
    assert new == {2 * n: n % 1500 for n in range(2000)}
