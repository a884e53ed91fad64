"""tensorflow_datasets itself writes RLDS; read without TensorFlow, it holds what TensorFlow reads in it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.mapping import CameraPart, ColumnPart, DepthPart, Mapping, Part
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.rlds import Source
from prts_core.data.convert.run import convert
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from tests.conformance.venvs import ensure_venv

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]
TFDS = [["tensorflow-cpu==2.21.0", "tensorflow-datasets==4.9.10", "protobuf<7"]]
MAPPING = Mapping(
    name="toy",
    source="rlds",
    fps=5.0,
    state=(Part("observation/state"), Part("observation/joints"), Part("observation/zlib"), Part("observation/bytes")),
    action=(Part("action"), Part("open_gripper")),
    cameras={"jpeg": CameraPart("observation/image_0", store="image"), "png": CameraPart("observation/image_1")},
    depth={"top": DepthPart("observation/depth")},
    columns={
        "next.reward": ColumnPart("reward"),
        "next.done": ColumnPart("is_last", "bool"),
        "box": ColumnPart("observation/box"),
        "label": ColumnPart("observation/label", "int64"),
    },
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """(the dataset's folder, "<split>/<episode>/<key>" -> what TensorFlow reads)."""
    try:
        python = ensure_venv("tfds-4.9.10", TFDS)
    except subprocess.CalledProcessError as err:
        pytest.skip(f"tensorflow_datasets cannot be installed here: {err}")
    folder = tmp_path_factory.mktemp("tfds")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2", "NO_GCE_CHECK": "true"}
    command = [python, Path(__file__).with_name("write_with_tfds.py"), folder / "data", folder / "read.npz"]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "read.npz") as arrays:
        return folder / "data", dict(arrays)


def test_every_feature_is_read_as_tensorflow_reads_it(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, theirs = written
    source = Source(root, MAPPING)
    assert not source.unread
    episodes = source.scan().episodes
    assert [(episode.split, episode.length) for episode in episodes].count(("val", 4)) == 1 and len(episodes) == 4
    keys = [key for key, leaf in source.steps.items() if leaf.kind != "text"]
    assert len(keys) == 15
    for number, episode in enumerate(episodes):
        where = f"val/{number - 3}" if episode.split == "val" else f"train/{number}"
        assert episode.task.encode() == theirs[f"{where}/language_instruction"][0]
        for key, ours in source.read(episode, keys).items():
            wanted = theirs[f"{where}/{key}"]
            assert ours.dtype == wanted.dtype and ours.size == wanted.size, key
            if key == "observation/image_0":  # TensorFlow decodes JPEG by its fast transform
                off = np.abs(ours.astype(int) - wanted)
                assert off.max() <= 12 and off.mean() < 2
            else:
                assert np.array_equal(ours, wanted.reshape(ours.shape)), key


def test_it_becomes_a_sound_dataset(written: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    root, theirs = written
    convert(root, tmp_path / "made", tmp_path / "work", mapping=MAPPING, dataset="toy", robot=None, video=VideoConfig())
    made = LeRobotDataset.open(tmp_path / "made")
    assert np.array_equal(made.actions(0)[:, :7], theirs["train/0/action"])
    assert np.array_equal(made.depth(3, "observation.depth.top"), theirs["val/0/observation/depth"][..., 0])
    assert made.depth(3, "observation.depth.top").max() > 32767, "depth is unsigned"
    assert np.array_equal(made.columns(1, ["label"])["label"], theirs["train/1/observation/label"])
    report = validate_dataset(made.root)
    assert report.ok, report.markdown()
