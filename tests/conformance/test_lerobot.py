"""lerobot 0.3.3 itself opens the datasets we write and import, and sees the same numbers and pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.places import shared_folder
from prts_core.config.schema import VideoConfig
from prts_core.config.sources import LeRobotSource
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.files import read_json, write_json
from prts_core.stages.stats import write_statistics
from tests.conformance.venvs import ensure_venv
from tests.data.conftest import convert_toy, write_raw
from tests.data.reference import rows_of
from tests.data.test_convert_robomimic import mapped, run, write_demos

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]
CHUNK = 5
# torchvision and lerobot come without dependencies: their pins contradict the torch that is known to install here.
LEROBOT = [
    ["torch==2.13.0", "numpy==2.2.6", "datasets==3.6.0", "huggingface-hub==0.36.*", "av==15.1.0", "jsonlines"],
    ["packaging", "einops", "pillow"],
    ["--no-deps", "lerobot==0.3.3", "torchvision==0.28.0"],
]


@pytest.fixture(scope="module")
def python() -> Path:
    return ensure_venv("lerobot-0.3.3", LEROBOT)


def read(python: Path, root: Path, out: Path) -> dict[str, np.ndarray]:
    """What lerobot reads, frame by frame, without any network."""
    return ask(python, "read_with_lerobot.py", out, root, out, CHUNK)


def ask(python: Path, script: str, out: Path, *arguments: object) -> dict[str, np.ndarray]:
    """What `script` leaves in `out`, run in lerobot's environment."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out.parent / "cache"), "HF_HOME": str(out.parent / "hf")}
    command = [str(part) for part in (python, Path(__file__).with_name(script), *arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return dict(arrays)


def compare(root: Path, theirs: dict[str, np.ndarray]) -> None:
    ours = LeRobotDataset.open(root)
    assert int(theirs["fps"]) == ours.fps and int(theirs["episodes"]) == len(ours.rows)
    assert len(theirs["index"]) == ours.info.total_frames
    keys = ["timestamp", "frame_index", "episode_index", "index", "task_index"]
    start = 0
    for row in ours.rows:
        part = slice(start, start + row.length)
        columns = ours.columns(row.episode_index, keys)
        assert all(np.array_equal(theirs[key][part].ravel(), columns[key]) for key in keys)
        assert np.array_equal(theirs["observation.state"][part], ours.states(row.episode_index))
        actions = ours.actions(row.episode_index)
        ahead = np.arange(row.length)[:, None] + np.arange(CHUNK)
        assert np.array_equal(theirs["action"][part], actions[np.minimum(ahead, row.length - 1)])
        assert np.array_equal(theirs["action_is_pad"][part], ahead >= row.length)
        assert set(theirs["task"][part]) == set(row.tasks)
        for camera in ours.camera_keys:
            # two builds of the same decoders: YUV to RGB may round differently
            pictures = ours.frames(row.episode_index, camera).astype(int)
            assert np.abs(theirs[camera][part] - pictures).max() <= 2
        start += row.length
    pooled = rows_of(ours, ours.episodes())
    assert np.allclose(theirs["stats/action/mean"], pooled.mean(0), atol=1e-5)
    assert np.allclose(theirs["stats/action/std"], pooled.std(0), atol=1e-5)


@pytest.mark.parametrize(
    "video", [VideoConfig(), VideoConfig(codec="libsvtav1", crf=30, preset="10")], ids=["h264", "av1"]
)
def test_lerobot_reads_what_we_convert(python: Path, tmp_path: Path, video: VideoConfig) -> None:
    made = convert_toy(tmp_path, write_raw(tmp_path / "raw"), video=video)
    theirs = read(python, made.root, tmp_path / "read.npz")
    compare(made.root, theirs)
    assert theirs["next.success"].sum() == 3 * 6  # rows from success on, in each of six episodes


def test_lerobot_reads_a_renumbered_import(python: Path, tmp_path: Path) -> None:
    root = shared_folder() / "data/g1_bottle"
    if not root.is_dir():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    source = LeRobotSource(kind="lerobot", root=str(root), episodes=(2, 1), heldout_episodes=1)
    import_lerobot(root, tmp_path / "ours", dataset="g1", source=source, robot=None)
    ours = LeRobotDataset.open(tmp_path / "ours")
    info = ours.info
    assert info.splits == {"train": "0:1", "heldout": "1:2"}
    slim = _without_video(tmp_path / "ours", tmp_path / "slim")
    compare(slim, read(python, slim, tmp_path / "read.npz"))


def _without_video(root: Path, slim: Path) -> Path:
    """The same dataset without its camera: decoding 700 AV1 frames one by one would take minutes."""
    shutil.copytree(root, slim, ignore=shutil.ignore_patterns("videos"))
    info = read_json(slim / "meta/info.json")
    info["features"].pop("observation.images.cam_high")
    write_json(slim / "meta/info.json", info | {"video_path": None, "total_videos": 0})
    return slim


def test_lerobot_reads_stills_and_depth(python: Path, tmp_path: Path) -> None:
    mapping = mapped(
        cameras={"front": {"key": "obs/agentview_rgb", "store": "image"}, "side": {"key": "obs/eye_in_hand_rgb"}},
        depth={"front": {"key": "obs/depth", "source_unit": "m"}},
    )

    def far(made: dict[str, np.ndarray]) -> None:
        made["obs/depth"][0, 2, 3] = 40.0

    root = run(write_demos(tmp_path / "raw", count=2, change=far), tmp_path, mapping)
    theirs = read(python, root, tmp_path / "read.npz")
    compare(root, theirs)
    ours = LeRobotDataset.open(root)
    depth = np.concatenate([ours.depth(episode, "observation.depth.front") for episode in ours.episodes()])
    assert set(np.unique(depth)) == {700, 40_000}
    # torch has no tensors of 16 bits without a sign (lerobot's ToTensor makes int16 of them): beyond 32767 the bits are
    # the same, and the reader's number is ours less 65536
    shown = theirs["observation.depth.front"][:, 0]
    assert np.array_equal(shown.astype(np.int64) % 65536, depth)


def test_lerobot_normalises_with_our_statistics(python: Path, tmp_path: Path) -> None:
    """forms/lerobot/stats.json in lerobot's own reader and `Normalize`, cameras too; of a dataset whose episodes are
    all in the split, it is what lerobot pools from episodes_stats.jsonl itself."""
    raw = write_raw(tmp_path / "raw")
    shutil.rmtree(raw / "heldout")
    root = convert_toy(tmp_path, raw).root
    write_statistics(tmp_path / "stats", [root], "toy", "train", None, "QUANTILE")
    form = tmp_path / "stats/forms/lerobot/stats.json"
    (tmp_path / "as/meta").mkdir(parents=True)
    shutil.copy(form, tmp_path / "as/meta/stats.json")
    theirs = ask(
        python, "normalize_with_lerobot.py", tmp_path / "read.npz", tmp_path / "as", root, tmp_path / "read.npz"
    )
    stats = read_json(form)
    for key in ("observation.state", "action", "observation.images.top", "observation.images.wrist"):
        ours = {name: np.array(stats[key][name]) for name in ("mean", "std", "min", "max")}
        shape = theirs[f"MEAN_STD/{key}"].shape
        wanted = np.broadcast_to((0.25 - ours["mean"]) / (ours["std"] + 1e-8), shape)
        np.testing.assert_allclose(theirs[f"MEAN_STD/{key}"], wanted, rtol=1e-4, atol=1e-5)
        wanted = np.broadcast_to((0.25 - ours["min"]) / (ours["max"] - ours["min"] + 1e-8) * 2 - 1, shape)
        np.testing.assert_allclose(theirs[f"MIN_MAX/{key}"], wanted, rtol=1e-4, atol=1e-5)
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[f"pooled/{key}/{name}"], value, rtol=1e-5, atol=1e-6)
        assert theirs[f"pooled/{key}/count"].tolist() == stats[key]["count"]
