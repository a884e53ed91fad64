"""The index says of every episode what its tables say, whoever maps it; a damaged or foreign one is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from prts_core.data.goals import SUCCESS, stretches
from prts_core.data.index import FAILED, NOT_RECORDED, REACHED, DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.subtasks import Subtasks
from prts_core.io.errors import DataError
from prts_core.io.files import read_json, read_jsonl, write_json, write_jsonl
from tests.data.test_goals import changed, halves
from tests.fixtures.reaching import write_reaching


def with_subtasks(root: Path) -> LeRobotDataset:
    """Episodes 0 and 3 show two subtasks each."""
    rows = read_jsonl(root / "meta" / "episodes.jsonl")
    for episode in (0, 3):
        length = rows[episode]["length"]
        spans = [{"end_frame": 5, "action_text": "begin"}, {"end_frame": length, "action_text": f"go on {episode}"}]
        rows[episode]["action_config"] = spans
    write_jsonl(root / "meta" / "episodes.jsonl", rows)
    return LeRobotDataset.open(root)


@pytest.fixture
def dataset(tmp_path: Path) -> LeRobotDataset:
    root = write_reaching(tmp_path, per_goal=2).root

    def change(index: int, columns: dict[str, np.ndarray]) -> None:
        halves(index, columns)
        columns[SUCCESS][-2:] = index in (1, 2, 4)

    changed(root, change, success=True)
    return with_subtasks(root)


def test_an_index_says_what_the_tables_say(dataset: LeRobotDataset, tmp_path: Path) -> None:
    DatasetIndex.of(dataset).save(tmp_path / "index")
    index = DatasetIndex.open(tmp_path / "index", dataset.root)
    for episode in dataset.episodes():
        told, mapped = Subtasks.of_episode(dataset.rows[episode]), index.subtasks(episode)
        assert (mapped.texts, mapped.ends) == (told.texts, told.ends)
        assert list(mapped.stretches) == stretches(dataset, episode)
        assert index.lengths[episode] == dataset.length(episode) == mapped.length
    assert index.tasks == dataset.tasks and index.texts == ["begin", "go on 0", "go on 3"]
    assert index.stretches_of(np.array([2, 0])).tolist() == [3, 0, 1]
    assert isinstance(np.load(tmp_path / "index" / "stretches.npy", mmap_mode="r"), np.memmap)


def test_failed_and_not_recorded_stay_two_things(tmp_path: Path) -> None:
    root = write_reaching(tmp_path, per_goal=2).root
    plain = DatasetIndex.of(LeRobotDataset.open(root)).stretches
    assert set(plain["success"]) == {NOT_RECORDED} and (plain["goal"] == plain["end"] - 1).all()
    told = DatasetIndex.of(changed(root, lambda i, c: c[SUCCESS].__setitem__(-1, i == 1), success=True)).stretches
    assert told["success"].tolist() == [FAILED, REACHED, FAILED, FAILED, FAILED, FAILED]
    assert (told["goal"] >= 0).tolist() == (told["success"] == REACHED).tolist()


def test_equal_datasets_give_equal_bytes(dataset: LeRobotDataset, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 3)):
        DatasetIndex.of(dataset, workers).save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 5
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_a_reader_with_lengths_does_not_read_the_episodes(dataset: LeRobotDataset) -> None:
    lengths = DatasetIndex.of(dataset).lengths
    (dataset.root / "meta" / "episodes.jsonl").write_text("no json")
    opened = LeRobotDataset.open(dataset.root, lengths)
    assert opened.episodes("train") == dataset.episodes("train")
    assert len(opened.actions(3)) == lengths[3]
    with pytest.raises(DataError):
        LeRobotDataset.open(dataset.root)


@pytest.mark.parametrize("damage", ["cut", "pickle", "foreign", "format", "missing", "shorter"])
def test_an_index_that_does_not_fit_is_refused(dataset: LeRobotDataset, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "index"
    DatasetIndex.of(dataset).save(folder)
    table = folder / "stretches.npy"
    if damage == "cut":
        table.write_bytes(table.read_bytes()[:-9])
    elif damage == "pickle":
        np.save(table, np.array([{"a": 1}], object), allow_pickle=True)
    elif damage == "foreign":
        tasks = dataset.root / "meta" / "tasks.jsonl"
        tasks.write_text(tasks.read_text() + " \n")
    elif damage == "format":
        write_json(folder / "index.json", read_json(folder / "index.json") | {"format": 0})
    elif damage == "missing":
        shutil.rmtree(folder)
    else:
        np.save(table, np.load(table)[:-1])
    with pytest.raises(DataError, match="prts stats"):
        DatasetIndex.open(folder, dataset.root)
