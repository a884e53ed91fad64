"""Choosing cameras and columns of a foreign dataset: joined, renamed, and a valid dataset afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.config.schema import RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.contract import Contract
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ConfigError, ContractError, DataError
from prts_core.io.files import read_json, read_jsonl, write_jsonl
from tests.data.conftest import Converted

WHOLE, ARM, HAND = "observation.state", "observation.state.arm", "observation.state.hand"


@pytest.fixture
def split(tmp_path: Path, toy: Converted) -> Path:
    """The toy dataset as another lab writes it: the state in two columns, arm (3) and hand (1)."""
    root = tmp_path / "theirs"
    shutil.copytree(toy.root, root)
    (root / "meta/contract.json").unlink()
    info = read_json(root / "meta/info.json")
    del info["features"][WHOLE]
    info["features"] |= {
        ARM: {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        HAND: {"dtype": "float32", "shape": [1], "names": None},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        state = np.stack(table.column(WHOLE).to_pylist()).astype(np.float32)
        table = table.drop_columns([WHOLE])
        table = table.append_column(ARM, pa.array(state[:, :3].tolist(), pa.list_(pa.float32())))
        pq.write_table(table.append_column(HAND, pa.array(state[:, 3])), path)
    stats = read_jsonl(root / "meta/episodes_stats.jsonl")
    for row in stats:
        whole = row["stats"].pop(WHOLE)
        for key, part in ((ARM, slice(0, 3)), (HAND, slice(3, 4))):
            row["stats"][key] = {n: v if n == "count" else v[part] for n, v in whole.items()}
    write_jsonl(root / "meta/episodes_stats.jsonl", stats)
    return root


def take(root: Path, output: Path, robot: RobotConfig | None = None, **source: object) -> Contract:
    settings = LeRobotSource(kind="lerobot", root=str(root), **source)  # type: ignore[arg-type]
    return import_lerobot(root, output, dataset="theirs", source=settings, robot=robot)


def test_state_columns_are_joined_by_default(tmp_path: Path, split: Path, toy: Converted) -> None:
    contract = take(split, tmp_path / "ours")
    ours, old = LeRobotDataset.open(tmp_path / "ours"), LeRobotDataset.open(toy.root)
    assert [dim.name for dim in contract.state] == ["x", "y", "z", "state.hand"]
    for episode in range(len(ours.rows)):
        assert (ours.states(episode) == old.states(episode)).all()
        assert (ours.actions(episode) == old.actions(episode)).all()
    report = validate_dataset(tmp_path / "ours")
    assert report.ok and not report.warnings, report.markdown()


def test_columns_and_cameras_are_chosen_in_order(tmp_path: Path, split: Path, toy: Converted) -> None:
    contract = take(split, tmp_path / "ours", select_state=(HAND, ARM), select_video=("observation.images.wrist",))
    ours, old = LeRobotDataset.open(tmp_path / "ours"), LeRobotDataset.open(toy.root)
    assert [dim.name for dim in contract.state] == ["state.hand", "x", "y", "z"]
    assert (ours.states(1) == old.states(1)[:, [3, 0, 1, 2]]).all()
    assert ours.camera_keys == ["observation.images.wrist"] and len(contract.cameras) == 1
    assert not (tmp_path / "ours/videos/chunk-000/observation.images.top").exists()
    assert validate_dataset(tmp_path / "ours").ok


def test_a_part_of_the_state_takes_its_name(tmp_path: Path, split: Path, toy: Converted) -> None:
    contract = take(split, tmp_path / "ours", select_state=(ARM,))
    assert [dim.name for dim in contract.state] == ["x", "y", "z"]
    assert (LeRobotDataset.open(tmp_path / "ours").states(0) == LeRobotDataset.open(toy.root).states(0)[:, :3]).all()
    assert validate_dataset(tmp_path / "ours").ok


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ({"select_state": ("observation.state.arn",)}, ConfigError, "did you mean 'observation.state.arm'"),
        ({"select_video": ("observation.images.left",)}, ConfigError, "select_video"),
        ({"select_action": ("action", "action")}, ConfigError, "selected twice"),
        ({"select_state": ()}, DataError, "one state and one action vector"),
    ],
)
def test_wrong_choices_are_named(tmp_path: Path, split: Path, source: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        take(split, tmp_path / "ours", **source)
    assert not (tmp_path / "ours").exists()


def test_relative_flags_of_a_tag(tmp_path: Path, split: Path) -> None:
    flags = (True, True, True, False)
    contract = take(split, tmp_path / "ours", RobotConfig("arm", relative=flags))
    assert tuple(dim.relative for dim in contract.action) == flags
    long = RobotConfig("full", relative=(True,) * 32, truncate=True)
    assert all(dim.relative for dim in take(split, tmp_path / "cut", long).action)
    with pytest.raises(ContractError, match=r"configs/robots/arm\.yaml.*3 flags.*4 dimensions"):
        take(split, tmp_path / "no", RobotConfig("arm", relative=flags[:3]))
    with pytest.raises(ContractError, match=r"no state to be relative to.*state has 3"):
        take(split, tmp_path / "no", RobotConfig("arm", relative=(True,) * 4), select_state=(ARM,))
    with pytest.raises(ValueError, match="not both"):
        RobotConfig("arm", action=(), relative=(True,), truncate=True) and RobotConfig(
            "arm",
            action=take(split, tmp_path / "x").action,
            relative=(True,),  # type: ignore[arg-type]
        )
