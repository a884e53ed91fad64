"""Rows of episodes in any order: the numbers and pictures of an eager reading, whoever reads; decoders end."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from prts_core.config.schema import VideoConfig
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.frames import OpenVideo, VideoPool
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import DataError
from prts_core.training.episodes import EpisodeReader
from tests.data.conftest import Converted, toy
from tests.data.test_video import moving_square

__all__ = ["toy"]  # a fixture


@pytest.fixture(scope="module")
def dataset(toy: Converted) -> LeRobotDataset:
    return LeRobotDataset.open(toy.root)


@pytest.fixture
def reader(dataset: LeRobotDataset) -> Iterator[EpisodeReader]:
    made = EpisodeReader(dataset)
    yield made
    made.close()


def test_rows_are_those_of_an_eager_reading(dataset: LeRobotDataset, reader: EpisodeReader) -> None:
    camera, rng = dataset.camera_keys[0], np.random.default_rng(3)
    eager = {e: dataset.frames(e, camera) for e in dataset.episodes()}

    def check(place: tuple[int, int]) -> None:
        episode, row = place
        states, actions = reader.numbers(episode)
        assert np.array_equal(states, dataset.states(episode)) and np.array_equal(actions, dataset.actions(episode))
        assert np.array_equal(reader.rgb(episode, camera, row), eager[episode][row])
        small = dataset.frames(episode, camera, [row], size=16)[0]
        assert np.array_equal(reader.rgb(episode, camera, row, 16), small)

    places = [(int(e), int(rng.integers(dataset.length(int(e))))) for e in rng.choice(dataset.episodes(), 30)]
    for place in places:
        check(place)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(check, places))


def test_tables_are_kept_within_their_room(dataset: LeRobotDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(part.nbytes for part in EpisodeReader(dataset).numbers(0))
    reader, read = EpisodeReader(dataset, table_mib=2.5 * size / 2**20), []
    columns = dataset.columns
    monkeypatch.setattr(dataset, "columns", lambda episode, keys: read.append(episode) or columns(episode, keys))
    for episode in (0, 1, 0, 1, 2, 3, 2, 0):
        reader.numbers(episode)
    assert read[:2] == [0, 1] and read.count(0) == 2 and len(reader._tables) <= 3
    tiny = EpisodeReader(dataset, table_mib=0)
    assert np.array_equal(tiny.numbers(0)[0], dataset.states(0)), "one that has no room is read all the same"


@pytest.mark.parametrize("width", [64, 50, 56])
def test_planar_colours_at_odd_widths(tmp_path: Path, width: int) -> None:
    video.encode(tmp_path / "v.mp4", moving_square(4, 48, 80)[:, :, :width], 20, VideoConfig())
    with VideoPool() as pool, pool.video(tmp_path / "v.mp4") as opened:
        for number in (3, 0):
            assert np.array_equal(opened.chw(number), opened.rgb(number).transpose(2, 0, 1).astype(np.float32) / 255)


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
    camera = dataset.camera_keys[0]
    path = root / dataset.info.video_file(1, camera)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("no video")
    elif damage == "missing":
        path.unlink()
    else:
        video.encode(path, dataset.frames(1, camera)[:3], 20, VideoConfig())
    reader = EpisodeReader(dataset)
    with pytest.raises(DataError, match=r"episode_000001\.mp4"):
        reader.rgb(1, camera, dataset.length(1) - 1)
    assert reader.rgb(0, camera, 0).shape == (*dataset.info.features[camera].image_size, 3), "the others are still read"
    reader.close()


def open_files(root: Path) -> list[Path]:
    """What this process holds open below `root`; what other tests hold or drop meanwhile is no matter of this one."""
    held = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them, and what another thread closes
            held.append(descriptor.readlink())
    return [path for path in held if path.is_relative_to(root.resolve())]


def test_decoders_are_bounded_and_closed(toy: Converted, tmp_path: Path) -> None:
    root = Path(shutil.copytree(toy.root, tmp_path / "data"))  # nobody else has opened these files
    dataset = LeRobotDataset.open(root)
    reader = EpisodeReader(dataset, max_open=2)
    for episode in dataset.episodes():
        reader.rgb(episode, dataset.camera_keys[0], 1)
    assert 1 <= len(open_files(root)) <= 2
    reader.close()
    assert open_files(root) == []


def _digest(reader: EpisodeReader, camera: str, places: list[tuple[int, int]]) -> list[int]:
    return [
        int(reader.rgb(episode, camera, row).astype(np.int64).sum() + reader.numbers(episode)[0][row].sum() * 1000)
        for episode, row in places
    ]


def _send(reader: EpisodeReader, camera: str, places: list[tuple[int, int]], out: multiprocessing.Queue) -> None:
    out.put(_digest(reader, camera, places))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_worker_processes_read_the_same(dataset: LeRobotDataset, reader: EpisodeReader, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    camera = dataset.camera_keys[0]
    lists = [[(0, 3), (1, 4), (0, 11), (0, 3)], [(1, 12), (0, 4), (1, 5), (0, 0)]]
    mine = [_digest(reader, camera, part) for part in lists]  # warm here, too
    for part, expected in zip(lists, mine, strict=True):
        out = context.Queue()
        child = context.Process(target=_send, args=(reader, camera, part, out))
        child.start()
        assert out.get(timeout=240) == expected == _digest(reader, camera, part)
        child.join()
        assert child.exitcode == 0
    assert _digest(pickle.loads(pickle.dumps(reader)), camera, lists[0]) == mine[0]
