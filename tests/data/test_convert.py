"""Raw HDF5 to LeRobot v2.1: what is written, that it can be cut and goes on, and what bad recordings are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from prts_core.config.schema import DimensionSpec
from prts_core.contract import Contract
from prts_core.data.embodiment import camera_label
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import ConfigError, ContractError, DataError
from prts_core.io.files import read_json, read_jsonl
from prts_core.store.listing import digest_tree
from tests.data.conftest import ROBOT, Converted, convert_toy, write_raw


def test_numbers_are_those_of_the_recording(toy: Converted) -> None:
    made = LeRobotDataset.open(toy.root)
    assert made.episodes("train") == [0, 1, 2, 3] and made.episodes("heldout") == [4, 5]
    assert made.tasks == {0: "turn the dial", 1: "open the faucet"}
    start = 0
    for row in made.rows:
        assert row.source is not None and row.success_row is not None
        with h5py.File(toy.raw / row.source["file"]) as file:
            demo = file[f"data/{row.source['demo']}"]
            assert (made.actions(row.episode_index) == demo["actions"][:]).all()
            assert (made.states(row.episode_index) == demo["obs/proprio"][:]).all()
            top = made.frames(row.episode_index, "observation.images.top")
            assert np.abs(top.astype(int) - demo["obs/top_rgb"][:]).mean() < 6
            assert (row.seed, row.success_row) == (demo.attrs["seed"], demo.attrs["success_row"])
        keys = ["timestamp", "frame_index", "episode_index", "index", "task_index", "next.success"]
        columns = made.columns(row.episode_index, keys)
        rows = np.arange(row.length)
        assert np.allclose(columns["timestamp"], rows / 20) and columns["timestamp"].dtype == np.float32
        assert (columns["index"] == start + rows).all() and (columns["frame_index"] == rows).all()
        assert (columns["episode_index"] == row.episode_index).all()
        assert {made.tasks[int(number)] for number in columns["task_index"]} == set(row.tasks)
        assert (columns["next.success"] == (rows >= row.success_row)).all()
        assert [span.action_text for span in row.spans] == ["reach it", "turn it"] and row.spans[
            -1
        ].end_frame == row.length
        start += row.length


def test_files_are_as_lerobot_writes_them(toy: Converted) -> None:
    info = read_json(toy.root / "meta/info.json")
    assert info["codebase_version"] == "v2.1" and info["fps"] == 20 and isinstance(info["fps"], int)
    assert info["splits"] == {"train": "0:4", "heldout": "4:6"} and info["total_videos"] == 12
    assert list(info["features"])[-5:] == ["timestamp", "frame_index", "episode_index", "index", "task_index"]
    assert info["features"]["observation.images.top"]["info"]["video.codec"] == "h264"
    schema = pq.read_schema(toy.root / "data/chunk-000/episode_000000.parquet")
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert described["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "Sequence"}
    assert (
        described["next.success"] == {"dtype": "bool", "_type": "Value"} and "observation.images.top" not in described
    )
    assert str(schema.field("action").type) == "fixed_size_list<element: float>[4]"
    stats = read_jsonl(toy.root / "meta/episodes_stats.jsonl")[0]["stats"]
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1) and stats["next.success"]["min"] == [False]
    with h5py.File(toy.raw / "train/dial-turn_demo.hdf5") as file:
        raw = file["data/demo_0/obs/top_rgb"][:] / 255
        assert np.allclose(np.ravel(stats["observation.images.top"]["mean"]), raw.mean((0, 1, 2)))
        assert np.allclose(np.ravel(stats["observation.images.top"]["std"]), raw.std((0, 1, 2)))
        assert np.allclose(stats["action"]["std"], file["data/demo_0/actions"][:].std(0), atol=1e-6)


def test_contract_is_born_here(toy: Converted) -> None:
    assert Contract.load(toy.root / "meta/contract.json") == toy.contract
    assert [dim.name for dim in toy.contract.state] == ["x", "y", "z", "grip"] and toy.contract.action[0].unit == "cm"
    labels = {camera.key: camera.label for camera in toy.contract.cameras}
    assert labels == {"observation.images.top": "Camera top", "observation.images.wrist": "Camera wrist"}
    assert toy.contract.control_hz == 20.0


def test_result_does_not_depend_on_workers_or_interruptions(tmp_path: Path, toy: Converted) -> None:
    assert digest_tree(convert_toy(tmp_path, toy.raw, workers=3).root) == digest_tree(toy.root)
    (tmp_path / "output/data/chunk-000/episode_000002.parquet").write_bytes(b"half")
    (tmp_path / "output/videos/chunk-000/.episode_000001.mp4.partial-77").write_bytes(b"left by a killed process")
    (tmp_path / "episodes/000004.json").unlink()
    untouched = tmp_path / "output/videos/chunk-000/observation.images.top/episode_000000.mp4"
    before = untouched.stat().st_mtime_ns
    assert digest_tree(convert_toy(tmp_path, toy.raw).root) == digest_tree(toy.root)
    assert untouched.stat().st_mtime_ns == before


KILLED = """
import os, pathlib, signal, sys
from prts_core.data.convert import run
from tests.data.conftest import convert_toy
write, done = run.write_episode, []
def until(layout, episode):
    done.append(write(layout, episode))
    if len(done) == 7:
        os.kill(os.getpid(), signal.SIGKILL)  # without a record of this one, and perhaps of the other worker's
    return done[-1]
run.write_episode = until
convert_toy(*map(pathlib.Path, sys.argv[1:]), workers=2)
"""


def test_kill_9_and_again(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", train=9, rows=30, size=64)
    whole = digest_tree(convert_toy(tmp_path / "whole", raw).root)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cut"), str(raw)]
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert died.returncode == -signal.SIGKILL
    records = tmp_path / "cut/episodes"
    done = {path.name: path.stat().st_mtime_ns for path in records.glob("0*.json")}
    assert 5 <= len(done) < 20 and not (tmp_path / "cut/output/meta/info.json").exists()
    assert digest_tree(convert_toy(tmp_path / "cut", raw).root) == whole
    assert all((records / name).stat().st_mtime_ns == at for name, at in done.items()), "finished episodes were redone"


# ---- what is refused ---------------------------------------------------------------------------------------------
def _change(raw: Path, do: object) -> None:
    with h5py.File(raw / "train/faucet-open_demo.hdf5", "r+") as file:
        do(file["data/demo_1"], file)  # type: ignore[operator]


def _replace(key: str, value: np.ndarray) -> object:
    def do(demo: h5py.Group, _: h5py.File) -> None:
        del demo[key]
        demo[key] = value

    return do


def _nan(demo: h5py.Group, _: h5py.File) -> None:
    demo["actions"][4, 2] = np.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_nan, ["faucet-open_demo.hdf5", "demo_1", "row 4, dimension 2", "nan"]),
        (_replace("actions", np.zeros((13, 5), np.float32)), ["demo_1/actions", "(5,)", "(4,)"]),
        (_replace("obs/proprio", np.zeros((9, 4), np.float32)), ["demo_1/obs/proprio", "9 rows", "13 rows"]),
        (_replace("obs/top_rgb", np.zeros((13, 16, 16, 3), np.uint8)), ["obs/top_rgb", "(16, 16, 3)", "(32, 32, 3)"]),
        (_replace("obs/top_rgb", np.zeros((13, 32, 32, 3), np.float32)), ["obs/top_rgb", "float32"]),
        (lambda demo, file: demo.__delitem__("obs/wrist_rgb"), ["lacks a key", "wrist_rgb"]),
        (lambda demo, file: demo.__delitem__("actions"), ["/data/demo_1/actions", "robomimic"]),
        (lambda demo, file: file["data"].attrs.__delitem__("problem_info"), ["problem_info"]),
        (lambda demo, file: file["data"].attrs.__setitem__("problem_info", "{}"), ["no instruction"]),
        (lambda demo, file: demo.attrs.__setitem__("action_config", "[{"), ["action_config", "not JSON"]),
    ],
)
def test_bad_recordings_are_told_in_one_paragraph(tmp_path: Path, damage: object, words: list[str]) -> None:
    raw = write_raw(tmp_path / "raw")
    _change(raw, damage)
    before = digest_tree(raw)
    with pytest.raises(DataError) as error:
        convert_toy(tmp_path, raw)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert digest_tree(raw) == before and not (tmp_path / "output/meta").exists()


def test_truncated_recording(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    path = raw / "heldout/dial-turn_demo.hdf5"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"dial-turn_demo\.hdf5.*prts collect"):
        convert_toy(tmp_path, raw)


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prts collect"):
        convert_toy(tmp_path, tmp_path / "raw")


def test_robot_that_does_not_fit(tmp_path: Path, toy: Converted) -> None:
    with pytest.raises(ContractError, match=r"5 dimensions in the robot's YAML, 4 in the data"):
        convert_toy(tmp_path, toy.raw, robot=replace(ROBOT, state=(*ROBOT.state, DimensionSpec("extra"))))
    with pytest.raises(ConfigError, match=r"did you mean 'observation\.images\.top'"):
        convert_toy(tmp_path, toy.raw, robot=replace(ROBOT, cameras={"observation.images.topp": "x"}))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("observation.images.image_0", "Camera top"),
        ("observation.images.image_1", "Camera left wrist"),
        ("observation.images.image_2", "Camera right wrist"),
        ("observation.images.cam_high", "Camera high"),
        ("observation.images.wrist_image", "Wrist camera"),
        ("observation.images.camera_front", "Camera front"),
        ("observation.images.Scampi", "Camera scampi"),
        ("observation.image", "Camera"),
        ("observation.images.left_wrist", "Camera left wrist"),
    ],
)
def test_camera_labels(key: str, label: str) -> None:
    assert camera_label(key) == label
