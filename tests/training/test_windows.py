"""Windows at any row: the same numbers and pictures as an eager reading, whoever reads, however often; decoders end."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prts_core.config.schema import VideoConfig
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.frames import OpenVideo, VideoPool
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import ConfigError, DataError
from prts_core.training.windows import WindowDataset
from tests.data.conftest import Converted, toy
from tests.data.test_video import moving_square

__all__ = ["toy"]  # a fixture

CHUNK = {"action": [n / 20 for n in range(4)], "observation.state": [-0.1, 0.0, 0.05]}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def dataset(toy: Converted) -> LeRobotDataset:
    return LeRobotDataset.open(toy.root)


@pytest.fixture
def windows(dataset: LeRobotDataset) -> Iterator[WindowDataset]:
    made = WindowDataset(dataset, CHUNK)
    yield made
    made.close()


@pytest.fixture(scope="module")
def eager(dataset: LeRobotDataset) -> dict:
    """Everything in memory, as plain arrays: {episode: (states, actions, {camera: frames})}."""
    return {
        e: (dataset.states(e), dataset.actions(e), {c: dataset.frames(e, c) for c in dataset.camera_keys})
        for e in dataset.episodes()
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.floats(0, 1, exclude_max=True),
    steps=st.lists(st.integers(-40, 40), min_size=1, max_size=6),
    looks=st.lists(st.integers(-3, 3), min_size=1, max_size=3),
)
def test_windows_are_those_of_an_eager_reading(dataset, eager, where: float, steps: list, looks: list) -> None:
    camera = dataset.camera_keys[0]
    windows = WindowDataset(dataset, {"action": [s / 20 for s in steps], camera: [s / 20 for s in looks]})
    index = int(where * len(windows))
    episode, row = windows.locate(index)
    states, actions, frames = eager[episode]
    last = len(actions) - 1
    item = windows[index]
    windows.close()
    assert np.array_equal(item["action"], np.stack([actions[min(max(row + s, 0), last)] for s in steps]))
    assert item["action_is_pad"].tolist() == [not 0 <= row + s <= last for s in steps]
    assert np.array_equal(item[camera], np.stack([frames[camera][min(max(row + s, 0), last)] for s in looks]))
    assert item[f"{camera}_is_pad"].tolist() == [not 0 <= row + s <= last for s in looks]
    assert np.array_equal(item["observation.state"], states[row]) and item["frame_index"] == row
    assert item["episode_index"] == episode and item["task"] == dataset.instruction(episode)


def test_float_pictures_are_the_same_colours(dataset: LeRobotDataset) -> None:
    whole, small = WindowDataset(dataset, pictures="float32"), WindowDataset(dataset)
    for index in (0, 7, len(small) - 1):
        for camera in dataset.camera_keys:
            picture = whole[index][camera]
            assert picture.dtype == np.float32 and picture.flags.c_contiguous
            assert np.array_equal(picture, small[index][camera].transpose(2, 0, 1).astype(np.float32) / 255)


@pytest.mark.parametrize("width", [64, 50, 56])
def test_planar_colours_at_odd_widths(tmp_path: Path, width: int) -> None:
    video.encode(tmp_path / "v.mp4", moving_square(4, 48, 80)[:, :, :width], 20, VideoConfig())
    with VideoPool() as pool, pool.video(tmp_path / "v.mp4") as opened:
        for number in (3, 0):
            assert np.array_equal(opened.chw(number), opened.rgb(number).transpose(2, 0, 1).astype(np.float32) / 255)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_items_whatever_the_workers(windows: WindowDataset, workers: int) -> None:
    rows = np.random.default_rng(3).permutation(len(windows))[:30].tolist()
    alone, helped = list(windows.ahead(rows, 0)), list(windows.ahead(rows, workers))
    assert len(alone) == len(helped) == 30 and all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_every_row_of_the_episodes_is_there_once(dataset: LeRobotDataset) -> None:
    windows = WindowDataset(dataset, episodes=[4, 1], cameras=[], keys=["index"])
    seen = [int(windows[i]["index"]) for i in range(len(windows))]
    assert len(windows) == dataset.length(4) + dataset.length(1) == len(set(seen))


def test_items_own_their_numbers(windows: WindowDataset) -> None:
    before = windows[5]
    for value in windows[5].values():
        if isinstance(value, np.ndarray) and value.ndim:
            value[...] = 0
    assert same(before, windows[5])


@pytest.mark.parametrize("options", [{}, {"bf": "2"}], ids=["in order", "B-frames"])
@pytest.mark.parametrize("gop", [2, 12, 250])
def test_any_order_of_frames(tmp_path: Path, gop: int, options: dict) -> None:
    path, images = tmp_path / "v.mp4", moving_square(60, 48, 96)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"g": str(gop), "crf": "10", **options})
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        for image in images:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    whole = video.decode(path)
    reader = OpenVideo(path)
    rng = np.random.default_rng(gop)
    for number in [59, 0, 1, 2, 3, 3, 58, 59, 30, *rng.integers(0, 60, 40)]:
        assert np.array_equal(reader.rgb(int(number)), whole[number]), number
    assert reader.frames == 60
    with pytest.raises(DataError, match="60 frames"):
        reader.rgb(60)
    assert np.array_equal(reader.rgb(7), whole[7])  # a fault of the asker does not harm the reader
    reader.close()


def test_only_what_is_needed_is_decoded(tmp_path: Path) -> None:
    video.encode(tmp_path / "v.mp4", moving_square(60, 48, 96), 30, VideoConfig(gop=10))
    reader = OpenVideo(tmp_path / "v.mp4")
    assert [reader.distance(n) for n in (0, 9, 10, 25)] == [1, 10, 1, 6]
    reader.rgb(23)
    assert [reader.distance(n) for n in (23, 25, 22, 31)] == [0, 2, 3, 2]
    reader.close()


@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "short"])
def test_a_damaged_video_is_one_error(toy: Converted, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(toy.root, root)
    dataset = LeRobotDataset.open(root)
    path = root / dataset.info.video_file(1, dataset.camera_keys[0])
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("no video")
    elif damage == "missing":
        path.unlink()
    else:
        video.encode(path, dataset.frames(1, dataset.camera_keys[0])[:3], 20, VideoConfig())
    windows = WindowDataset(dataset)
    at = dataset.length(0)
    for workers in (0, 2):
        items = windows.ahead([0, at + dataset.length(1) - 1, 0], workers)
        assert next(items)["index"] == 0
        with pytest.raises(DataError, match=r"episode_000001\.mp4"):
            next(items)
    assert windows[0]["index"] == 0  # the others are still read
    windows.close()


def open_files(root: Path) -> list[Path]:
    """What this process holds open below `root`; what other tests hold or drop meanwhile is no matter of this one."""
    held = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them, and what another thread closes
            held.append(descriptor.readlink())
    return [path for path in held if path.is_relative_to(root.resolve())]


def test_decoders_are_bounded_and_closed(toy: Converted, tmp_path: Path) -> None:
    root = Path(shutil.copytree(toy.root, tmp_path / "data"))  # nobody else has opened these files
    windows = WindowDataset(LeRobotDataset.open(root), max_open=2)
    for _ in windows.ahead(list(range(len(windows)))[::3], 2):
        pass
    assert 1 <= len(open_files(root)) <= 2
    windows.close()
    assert open_files(root) == []
    items = windows.ahead(range(len(windows)), 2)
    next(items)
    assert open_files(root)
    items.close()  # one who stops early leaves nothing behind either
    windows.close()
    assert open_files(root) == []


def _digest(windows: WindowDataset, indices: list[int], out: multiprocessing.Queue) -> None:
    camera = windows.cameras[0]
    out.put([int(windows[index][camera].astype(np.int64).sum()) for index in indices])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_worker_processes_read_the_same(windows: WindowDataset, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    lists = [[3, 40, 11, 3], [12, 4, 41, 0]]
    camera = windows.cameras[0]
    mine = [[int(windows[index][camera].astype(np.int64).sum()) for index in part] for part in lists]  # warm here, too
    for part, expected in zip(lists, mine, strict=True):
        out = context.Queue()
        child = context.Process(target=_digest, args=(windows, part, out))
        child.start()
        interleaved = [int(windows[index][camera].astype(np.int64).sum()) for index in part]
        assert out.get(timeout=240) == expected == interleaved
        child.join()
        assert child.exitcode == 0
    assert same(pickle.loads(pickle.dumps(windows))[3], windows[3])


def test_wishes_that_cannot_be_met_are_refused(dataset: LeRobotDataset) -> None:
    with pytest.raises(ConfigError, match="between frames"):
        WindowDataset(dataset, {"action": [0.0, 0.03]})
    with pytest.raises(ConfigError, match="did you mean 'action'"):
        WindowDataset(dataset, {"actoin": [0.0]})
    with pytest.raises(ConfigError, match="no such feature"):
        WindowDataset(dataset, cameras=["observation.images.nowhere"])
    with pytest.raises(IndexError):
        WindowDataset(dataset, cameras=[])[10**6]
