"""lerobot 0.4.4 itself opens the v3.0 datasets we write, we open those that it writes, and both see the same frames."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.places import shared_folder
from prts_core.config.schema import VideoConfig
from prts_core.config.sources import LeRobotSource
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.convert.lerobot_v30 import import_dataset
from prts_core.data.convert.lerobot_v30_export import export
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from tests.conformance.venvs import ensure_venv
from tests.data.conftest import convert_toy, write_raw
from tests.data.reference import rows_of

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]
CHUNK = 5
# torchvision and lerobot come without dependencies: their pins contradict the torch that is known to install here.
LEROBOT = [
    ["torch==2.13.0", "numpy==2.2.6", "datasets==4.8.5", "huggingface-hub==0.36.*", "av==15.1.0", "jsonlines"],
    ["packaging", "einops", "pillow", "accelerate==1.15.0"],
    ["--no-deps", "lerobot==0.4.4", "torchvision==0.28.0"],
]


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return ensure_venv("lerobot-0.4.4", LEROBOT)
    except subprocess.CalledProcessError as err:
        pytest.skip(f"lerobot 0.4.4 cannot be installed here: {err}")


def lerobot(python: Path, folder: Path, *args: object) -> None:
    """Run lerobot on `args` without any network."""
    script = Path(__file__).with_name("read_with_lerobot_v30.py")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    command = [python, script, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def compare(ours: LeRobotDataset, v30: Path, python: Path, folder: Path) -> None:
    """Every item of lerobot's over `v30`, with windows by delta_timestamps, against our v2.1 dataset."""
    lerobot(python, folder, "read", v30, folder / "read.npz", CHUNK)
    with np.load(folder / "read.npz") as arrays:
        theirs = dict(arrays)
    assert int(theirs["fps"]) == ours.fps and int(theirs["episodes"]) == len(ours.rows)
    assert len(theirs["index"]) == ours.info.total_frames
    start = 0
    for row in ours.rows:
        part = slice(start, start + row.length)
        columns = ours.columns(row.episode_index, ["timestamp", "frame_index", "episode_index", "index", "task_index"])
        assert all(np.array_equal(theirs[key][part].ravel(), values) for key, values in columns.items())
        rows = np.arange(row.length)
        ahead, back = rows[:, None] + np.arange(CHUNK), rows[:, None] + np.array([-1, 0])
        actions, states = ours.actions(row.episode_index), ours.states(row.episode_index)
        assert np.array_equal(theirs["action"][part], actions[np.minimum(ahead, row.length - 1)])
        assert np.array_equal(theirs["action_is_pad"][part], ahead >= row.length)
        assert np.array_equal(theirs["observation.state"][part], states[np.maximum(back, 0)])
        assert set(theirs["task"][part]) == set(row.tasks)
        for camera in ours.camera_keys:
            pictures = ours.frames(row.episode_index, camera).astype(int)[np.maximum(back, 0)]
            # two builds of the same decoders: YUV to RGB may round differently
            assert np.abs(theirs[camera][part] - pictures).max() <= 2
        start += row.length
    pooled = rows_of(ours, ours.episodes())
    assert np.allclose(theirs["stats/action/mean"], pooled.mean(0), atol=1e-5)
    assert np.allclose(theirs["stats/action/std"], pooled.std(0), atol=1e-5)
    assert np.allclose(theirs["stats/action/min"], pooled.min(0), atol=1e-6)


@pytest.mark.parametrize(
    "video", [VideoConfig(), VideoConfig(codec="libsvtav1", crf=30, preset="10")], ids=["h264", "av1"]
)
def test_lerobot_reads_what_we_export(python: Path, tmp_path: Path, video: VideoConfig) -> None:
    made = convert_toy(tmp_path, write_raw(tmp_path / "raw"), video=video)
    ours = LeRobotDataset.open(made.root)
    export(made.root, tmp_path / "v30", tmp_path / "work", data_mb=0.004, video_mb=0.004)  # several files of each kind
    assert len(list((tmp_path / "v30/data").rglob("*.parquet"))) > 1
    assert len(list((tmp_path / "v30/videos").rglob("*.mp4"))) > 2
    compare(ours, tmp_path / "v30", python, tmp_path)


def test_we_read_what_lerobot_writes(python: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for episode, rows in enumerate((17, 9, 23)):
        arrays[f"{episode}/state"] = rng.normal(size=(rows, 3)).astype(np.float32)
        arrays[f"{episode}/action"] = rng.normal(size=(rows, 3)).astype(np.float32)
        coarse = rng.integers(0, 255, (rows, 8, 8, 3), dtype=np.uint8)
        arrays[f"{episode}/top"] = coarse.repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "arrays.npz", **arrays)  # type: ignore[arg-type]
    lerobot(python, tmp_path, "write", tmp_path / "theirs", tmp_path / "arrays.npz")
    import_dataset(tmp_path / "theirs", tmp_path / "ours", tmp_path / "work", dataset="toy", robot=None, workers=2)
    source = LeRobotSource(kind="lerobot", root=str(tmp_path / "theirs"))
    import_lerobot(tmp_path / "theirs", tmp_path / "linked", dataset="toy", source=source, robot=None)
    for name in ("theirs", "linked", "ours"):  # where it lies, taken over by links, copied into v2.1
        ours = LeRobotDataset.open(tmp_path / name)
        for episode in ours.episodes():
            assert np.array_equal(ours.states(episode), arrays[f"{episode}/state"])
            assert np.array_equal(ours.actions(episode), arrays[f"{episode}/action"])
            assert ours.instruction(episode) == f"task {episode % 2}"
        compare(ours, tmp_path / "theirs", python, tmp_path)  # the pictures, frame by frame
    assert validate_dataset(tmp_path / "linked").ok
    compare(ours, tmp_path / "linked", python, tmp_path)  # lerobot reads through the links


def test_g1_bottle_as_v30(python: Path, tmp_path: Path) -> None:
    root = shared_folder() / "data/g1_bottle"
    if not root.is_dir():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    export(root, tmp_path / "v30", tmp_path / "work")
    ours, camera = LeRobotDataset.open(root), "observation.images.cam_high"
    end = ours.length(0)
    first, after = end - 8, end + 8  # across the border of two episodes that share one video file
    lerobot(python, tmp_path, "read", tmp_path / "v30", tmp_path / "read.npz", CHUNK, first, after)
    with np.load(tmp_path / "read.npz") as theirs:
        assert theirs["index"].tolist() == list(range(first, after))
        assert np.array_equal(theirs["observation.state"][:8, 1], ours.states(0)[-8:])
        assert np.array_equal(theirs["observation.state"][8:, 1], ours.states(1)[:8])
        for part, frames in ((slice(0, 8), ours.frames(0, camera, range(first, end))), (slice(8, 16), None)):
            frames = ours.frames(1, camera, range(8)) if frames is None else frames
            assert np.abs(theirs[camera][part, 1].astype(int) - frames).max() <= 2
