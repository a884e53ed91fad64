"""LeRobot v3.0 and v3.1 read where they lie: the same numbers and pictures as v2.1; taken over without a copy."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.cli.main import main
from prts_core.config.schema import RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.contract import Contract
from prts_core.data import statistics
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.convert.lerobot_v30_export import export
from prts_core.data.index import DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.seal import SEAL, check_sizes
from prts_core.data.lerobot_v21.v30 import episode_tables
from prts_core.data.validation import validate_dataset
from prts_core.data.validation.repair import repair
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import digest_file, read_json, write_json
from prts_core.store.listing import digest_tree
from prts_core.training.episodes import EpisodeReader
from tests.data.conftest import ROBOT, Converted

TOP = "observation.images.top"


@pytest.fixture(scope="module")
def v30(toy: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset as v3.0, two or more episodes a file. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("v30")
    export(toy.root, folder / "v30", folder / "work", data_mb=0.02, video_mb=0.008)
    return folder / "v30"


@pytest.fixture
def theirs(v30: Path, tmp_path: Path) -> Path:
    """A copy as others write it: no Contract, no seal, one row group a table, all episodes of a table in it."""
    root = shutil.copytree(v30, tmp_path / "theirs")
    for name in ("meta/contract.json", SEAL):
        (root / name).unlink()
    for path in (root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path), path)
        assert pq.read_metadata(path).num_row_groups == 1
    return root


def take(root: Path, output: Path, robot: RobotConfig | None = ROBOT, **source: object) -> Contract:
    settings = LeRobotSource(kind="lerobot", root=str(root), **source)  # type: ignore[arg-type]
    return import_lerobot(root, output, dataset="theirs", source=settings, robot=robot)


def language(root: Path) -> None:
    """Make it v3.1: a column of annotations, of another form in each row."""
    info = read_json(root / "meta/info.json")
    info["features"]["language_events"] = {"dtype": "language", "shape": [1], "names": None}
    write_json(root / "meta/info.json", info | {"codebase_version": "v3.1"})
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        said = [[{"role": "user", "content": f"row {n}"}] * (n % 3) for n in range(len(table))]
        pq.write_table(table.append_column("language_events", pa.array(said)), path)


def test_the_same_as_v21(toy: Converted, theirs: Path) -> None:
    ours, there = LeRobotDataset.open(toy.root), LeRobotDataset.open(theirs)
    assert len({there.info.data_file(e) for e in there.episodes()}) < len(there.rows)
    assert len({there.info.video_file(e, TOP) for e in there.episodes()}) < len(there.rows)
    assert there.rows == ours.rows and there.tasks == ours.tasks and there.lengths.tolist() == ours.lengths.tolist()
    assert there.episode_stats() == ours.episode_stats()
    for split in (None, "train", "heldout"):
        assert there.episodes(split) == ours.episodes(split)
    draws = np.random.default_rng(0)
    for episode in ours.episodes():
        assert there.table(episode).equals(ours.table(episode))
        assert np.array_equal(there.frames(episode, TOP), ours.frames(episode, TOP))
    first, second = EpisodeReader(ours), EpisodeReader(there)
    for _ in range(30):
        episode = int(draws.integers(len(ours.rows)))
        row = int(draws.integers(ours.length(episode)))
        for one, other in zip(first.numbers(episode), second.numbers(episode), strict=True):
            assert np.array_equal(one, other)
        assert np.array_equal(first.rgb(episode, TOP, row), second.rgb(episode, TOP, row))
    first.close()
    second.close()
    one, other = DatasetIndex.of(ours), DatasetIndex.of(there)
    assert np.array_equal(one.stretches, other.stretches) and np.array_equal(one.spans, other.spans)
    assert (one.tasks, one.texts) == (other.tasks, other.texts)


def test_taken_over_without_a_copy(toy: Converted, theirs: Path, tmp_path: Path) -> None:
    before = digest_tree(theirs)
    contract = take(theirs, tmp_path / "ours")
    assert digest_tree(theirs) == before
    taken = LeRobotDataset.open(tmp_path / "ours")
    assert contract == taken.contract and contract.embodiment == "toy"
    heavy = [p for folder in ("data", "videos") for p in (taken.root / folder).rglob("*") if p.is_file()]
    assert heavy and all(path.is_symlink() for path in heavy)
    assert not any(path.is_symlink() for path in (taken.root / "meta").rglob("*"))
    report = validate_dataset(taken.root)
    assert report.findings == [], report.markdown()
    assert report.checks["videos"] == 12 and report.checks["row numbering"] == 6
    old, new = (statistics.compute(root, workers=2).stats for root in (toy.root, taken.root))
    assert np.array_equal(old.action.q01, new.action.q01) and np.array_equal(old.state.std, new.state.std)
    take(theirs, tmp_path / "ours")  # again, over what stands there
    for link in ("copy", "hardlink"):
        take(theirs, tmp_path / link, link=link)
        assert digest_tree(tmp_path / link) == digest_tree(taken.root)
        assert not any(path.is_symlink() for path in (tmp_path / link).rglob("*"))


@pytest.mark.parametrize("link", ["auto", "copy", "hardlink"])
def test_a_download_of_the_hub_is_taken_over(theirs: Path, tmp_path: Path, link: str) -> None:
    """Its files are relative links into a folder of blobs."""
    blobs = tmp_path / "hub/blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in theirs.rglob("*") if path.is_file()]:
        blob = path.rename(blobs / digest_file(path)[7:27])
        path.symlink_to(os.path.relpath(blob, path.parent))
    take(theirs, tmp_path / "ours", link=link)
    assert validate_dataset(tmp_path / "ours").ok
    moved = Path(shutil.move(theirs, tmp_path / "moved"))
    assert moved.is_dir() and all(
        p.is_symlink() == (link == "auto") for p in (tmp_path / "ours/data").rglob("*.parquet")
    )


def test_a_dataset_keeps_the_contract_that_it_carries(toy: Converted, v30: Path, tmp_path: Path) -> None:
    assert take(v30, tmp_path / "ours", robot=None) == toy.contract


def test_cameras_left_out_and_episodes_held_out(theirs: Path, tmp_path: Path) -> None:
    robot = ROBOT if set(ROBOT.cameras) == {TOP} else None
    gone = tmp_path / "ours/videos/gone.mp4"
    gone.parent.mkdir(parents=True)
    gone.symlink_to(tmp_path / "nowhere")  # of an earlier attempt
    take(theirs, tmp_path / "ours", robot, select_video=(TOP,), heldout_episodes=2)
    taken = LeRobotDataset.open(tmp_path / "ours")
    assert taken.camera_keys == [TOP] and taken.episodes("heldout") == [4, 5]
    assert not list((tmp_path / "ours/videos").rglob("*wrist*/*/*.mp4"))
    assert validate_dataset(taken.root).ok and not gone.is_symlink()


@pytest.mark.parametrize("choice", [{"episodes": (0, 2)}, {"select_state": ("observation.state", "timestamp")}])
def test_what_needs_other_tables_is_refused_and_the_cure_works(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: dict
) -> None:
    with pytest.raises(ConfigError, match="where it lies") as told:
        take(theirs, tmp_path / "ours", **choice)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(str(told.value.cure).split("`")[1])[1:]) == 0
    take(tmp_path / "theirs_v21", tmp_path / "ours", None, **choice)
    assert LeRobotDataset.open(tmp_path / "ours").info.codebase_version == "v2.1"


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_a_source_that_changed_is_one_error(theirs: Path, tmp_path: Path, change: str) -> None:
    take(theirs, tmp_path / "ours")
    check_sizes(tmp_path / "ours")
    path = next((theirs / "data").rglob("*.parquet"))
    kept = path.read_bytes()
    if change == "longer":
        path.write_bytes(kept + b"x")
    else:
        path.unlink()
    with pytest.raises(DataError, match="has changed") as told:
        check_sizes(tmp_path / "ours")
    assert str(path) in str(told.value.cure) and "prts convert" in str(told.value.cure)
    assert [f for f in validate_dataset(tmp_path / "ours").errors if f.check == "seal"]
    path.write_bytes(kept)
    check_sizes(tmp_path / "ours")


def test_v31(toy: Converted, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language(theirs)
    take(theirs, tmp_path / "ours")
    taken = LeRobotDataset.open(tmp_path / "ours")
    assert taken.info.codebase_version == "v3.1" and validate_dataset(taken.root).ok
    assert np.array_equal(taken.actions(2), LeRobotDataset.open(toy.root).actions(2))
    command = ["convert", "--source", "lerobot_v30", "--from", str(theirs), "--to", str(tmp_path / "v21")]
    assert main(command) == 0
    assert validate_dataset(tmp_path / "v21", foreign=True).ok


def edit_episodes(root: Path, column: str, value: object) -> None:
    path = episode_tables(root)[0]
    rows = pq.read_table(path).to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows), path)


def swap_rows(root: Path) -> None:
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.take(pa.array(np.arange(len(table))[::-1])), path)


def longer_table(root: Path) -> None:
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "gap": (lambda root: edit_episodes(root, "dataset_to_index", 3), "dataset_to_index"),
    "number": (lambda root: edit_episodes(root, "episode_index", None), "episode_index"),
    "kind": (lambda root: edit_episodes(root, "data/file_index", -1), "data/file_index"),
    "time": (lambda root: edit_episodes(root, f"videos/{TOP}/from_timestamp", 0.013), "from_timestamp"),
    "no time": (lambda root: edit_episodes(root, f"videos/{TOP}/from_timestamp", None), "from_timestamp"),
    "no task": (lambda root: edit_episodes(root, "tasks", []), "at least one sentence"),
    "task": (lambda root: edit_episodes(root, "tasks", ["never heard of"]), "never heard of"),
    "more": (lambda root: edit_episodes(root, "prts/more", "{half"), "prts/more"),
    "order": (swap_rows, "numbered wrongly"),
    "longer": (longer_table, "more than"),
    "video": (lambda root: next((root / "videos").rglob("*.mp4")).unlink(), "incomplete"),
    "table": (lambda root: os.truncate(next((root / "data").rglob("*.parquet")), 90), "truncated"),
    "episodes": (lambda root: episode_tables(root)[0].unlink(), "episodes' table is missing"),
}


@pytest.mark.parametrize("fault", BAD)
def test_refuses(theirs: Path, tmp_path: Path, fault: str) -> None:
    break_it, word = BAD[fault]
    break_it(theirs)
    with pytest.raises(DataError, match=word):
        take(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours/meta/info.json").exists()
    if fault != "more" and fault != "longer":
        assert validate_dataset(theirs, foreign=True).errors


def test_a_damaged_clip_is_found_in_its_episode(theirs: Path) -> None:
    info = LeRobotDataset.open(theirs).info
    shared = [e for e in range(6) if info.video_file(e, TOP) == info.video_file(1, TOP)]
    assert len(shared) > 1
    path = theirs / info.video_file(1, TOP)
    path.write_bytes(path.read_bytes()[:-400])
    found = {finding.file for finding in validate_dataset(theirs, foreign=True).errors}
    assert found <= {info.video_name(e, TOP) for e in shared} and found


def test_repair_says_what_it_repairs(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"v2\.1 are repaired") as told:
        repair(theirs, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(str(told.value.cure).split("`")[1])[1:]) == 0
