"""Import of datasets recorded by others: completeness, digests, subsets, splits, names, contracts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.load import present_root
from prts_core.config.places import shared_folder
from prts_core.config.schema import DimensionSpec, RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.contract import Contract
from prts_core.data import statistics
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ConfigError, ContractError, DataError, UnavailableError
from prts_core.io.files import digest_file, read_json
from prts_core.store.listing import digest_tree
from tests.data.conftest import Converted


@pytest.fixture
def theirs(tmp_path: Path, toy: Converted) -> Path:
    """A foreign dataset: no contract, nested names, another chunk size, unknown keys."""
    root = tmp_path / "theirs"
    shutil.copytree(toy.root, root)
    (root / "meta/contract.json").unlink()
    info = read_json(root / "meta/info.json")
    info["features"]["action"]["names"] = [["a", "b", "c", "d"]]
    info["features"]["observation.state"]["names"] = {"motors": ["s", "t", "u", "v"]}
    info |= {"made_by": "someone", "splits": {"train": "0:6"}}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def take(root: Path, output: Path, robot: RobotConfig | None = None, **source: object) -> Contract:
    settings = LeRobotSource(kind="lerobot", root=str(root), **source)  # type: ignore[arg-type]
    return import_lerobot(root, output, dataset="theirs", source=settings, robot=robot)


def test_whole_import_copies_bytes_and_makes_the_contract(tmp_path: Path, theirs: Path) -> None:
    before = digest_tree(theirs)
    contract = take(theirs, tmp_path / "ours")
    ours = LeRobotDataset.open(tmp_path / "ours")
    for row in ours.rows:
        for path in ours.info.episode_files(row.episode_index):
            assert digest_file(theirs / path) == digest_file(tmp_path / "ours" / path)
    info = read_json(tmp_path / "ours/meta/info.json")
    assert info["features"]["action"]["names"] == ["a", "b", "c", "d"] and info["made_by"] == "someone"
    assert [dim.name for dim in contract.state] == ["s", "t", "u", "v"] and contract.embodiment == "toy"
    assert contract == ours.contract and contract.action[0].unit == "unknown"
    assert validate_dataset(tmp_path / "ours").ok
    assert digest_tree(theirs) == before


def test_subset_and_heldout_are_renumbered(tmp_path: Path, theirs: Path) -> None:
    take(theirs, tmp_path / "ours", episodes=(5, 0, 3), heldout_episodes=1)
    ours, old = LeRobotDataset.open(tmp_path / "ours"), LeRobotDataset.open(theirs)
    assert ours.episodes("train") == [0, 1] and ours.episodes("heldout") == [2]
    for new, source in enumerate((5, 0, 3)):
        assert (ours.actions(new) == old.actions(source)).all()
        assert (ours.frames(new, "observation.images.top") == old.frames(source, "observation.images.top")).all()
    index = np.concatenate([ours.columns(new, ["index"])["index"] for new in range(3)])
    assert (index == np.arange(len(index))).all()
    report = validate_dataset(tmp_path / "ours")
    assert report.ok and not report.warnings, report.markdown()


def test_second_import_goes_on(tmp_path: Path, theirs: Path) -> None:
    take(theirs, tmp_path / "ours")
    whole = digest_tree(tmp_path / "ours")
    videos = tmp_path / "ours/videos/chunk-000/observation.images.top"
    kept = (videos / "episode_000000.mp4").stat().st_mtime_ns
    (videos / "episode_000003.mp4").write_bytes(b"half")
    (videos / ".episode_000004.mp4.partial-9").touch()
    take(theirs, tmp_path / "ours")
    assert digest_tree(tmp_path / "ours") == whole and (videos / "episode_000000.mp4").stat().st_mtime_ns == kept


def test_hardlinks_share_bytes(tmp_path: Path, theirs: Path) -> None:
    take(theirs, tmp_path / "ours", link="hardlink")
    file = "videos/chunk-000/observation.images.top/episode_000000.mp4"
    assert (tmp_path / "ours" / file).stat().st_ino == (theirs / file).stat().st_ino
    assert (tmp_path / "ours/meta/info.json").stat().st_ino != (theirs / "meta/info.json").stat().st_ino


def test_robot_names_apply_or_are_refused(tmp_path: Path, theirs: Path) -> None:
    named = RobotConfig("arm", action=tuple(DimensionSpec(f"joint_{i}", "rad") for i in range(4)), gripper="0 open")
    contract = take(theirs, tmp_path / "ours", robot=named)
    assert [dim.name for dim in contract.action] == ["joint_0", "joint_1", "joint_2", "joint_3"]
    assert [dim.name for dim in contract.state] == ["s", "t", "u", "v"] and contract.embodiment == "arm"
    with pytest.raises(ContractError, match=r"configs/robots/arm\.yaml.*3 dimensions.*4 in the data"):
        take(theirs, tmp_path / "other", robot=RobotConfig("arm", action=tuple(DimensionSpec(x) for x in "xyz")))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"delete": "videos/chunk-000/observation.images.wrist/episode_000003.mp4"},
            DataError,
            ["1 of its files", "000003.mp4"],
        ),
        ({"cut": "data/chunk-000/episode_000002.parquet"}, DataError, ["truncated", "episode_000002.parquet"]),
        ({"delete": "meta/info.json"}, DataError, ["info.json", "missing"]),
        ({"delete": "meta/episodes_stats.jsonl"}, DataError, ["per-episode statistics", "convert_dataset_v20_to_v21"]),
        ({"line": "meta/episodes.jsonl"}, DataError, ["episodes.jsonl", "line 3", "not valid JSON"]),
        ({"version": "v2.0"}, DataError, ["codebase_version", "v2.0", "v2.1"]),
        ({"data_path": "../../etc/passwd"}, DataError, ["data_path", "inside the dataset"]),
        ({"data_path": "{episode_index.__class__}"}, DataError, ["data_path", "may use"]),
        ({"episodes": (9,)}, ConfigError, ["source.episodes", "episode 9", "0 to 5"]),
        ({"episodes": (1, 1)}, ConfigError, ["named twice"]),
        ({"heldout_episodes": 6}, ConfigError, ["heldout_episodes", "0 to 5"]),
    ],
)
def test_bad_sources(tmp_path: Path, theirs: Path, change: dict, error: type, words: list[str]) -> None:
    kind, value = next(iter(change.items()))
    source: dict = {}
    if kind == "delete":
        (theirs / value).unlink()
    elif kind == "cut":
        (theirs / value).write_bytes((theirs / value).read_bytes()[:-300])
    elif kind == "line":
        lines = (theirs / value).read_text().splitlines()
        lines[2] = lines[2][:-3]
        (theirs / value).write_text("\n".join(lines))
    elif kind in ("version", "data_path"):
        info = read_json(theirs / "meta/info.json")
        info["codebase_version" if kind == "version" else kind] = value
        (theirs / "meta/info.json").write_text(json.dumps(info))
    else:
        source = change
    before = digest_tree(theirs)
    with pytest.raises(error) as told:
        take(theirs, tmp_path / "ours", **source)
    assert all(word in str(told.value) for word in words), str(told.value)
    assert digest_tree(theirs) == before and not (tmp_path / "ours/meta").exists()


def test_absent_source_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"not on this machine.*source\.root"):
        present_root("theirs", LeRobotSource(kind="lerobot", root=str(tmp_path / "nowhere")))


def test_real_g1_recording(tmp_path: Path) -> None:
    root = shared_folder() / "data/g1_bottle"
    if not root.is_dir():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    contract = take(
        root, tmp_path / "ours", robot=RobotConfig("g1", cameras={"observation.images.cam_high": "Camera high"})
    )
    assert len(contract.state) == len(contract.action) == 26 and contract.control_hz == 30.0
    assert contract.state[0].name == "kLeftShoulderPitch"
    assert (contract.cameras[0].height, contract.cameras[0].width) == (480, 640)
    report = validate_dataset(tmp_path / "ours", "ends")
    assert report.ok and not report.warnings, report.markdown()
    made = statistics.compute(tmp_path / "ours")
    assert made.stats.count == 1093 and made.stats.action.width == 26
    ours = LeRobotDataset.open(tmp_path / "ours")
    assert ours.frames(2, "observation.images.cam_high", [0, 356], size=64).shape == (2, 64, 64, 3)
