"""Time windows of g1_bottle beside bare PyAV (uint8 pictures) and lerobot 0.3.3 (float32, equal to its own items).

Peers are held to one core, as ours is but in the row of two workers; all take turns over the same items.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from rich.console import Console

from prts_core.bench.peer import Peer
from prts_core.bench.report import Row, interleave
from prts_core.config.places import shared_folder
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import DataError
from prts_core.training.windows import WindowDataset

ROUNDS, ITEMS, CHUNK = 9, 24, 50
NO_LEROBOT = "lerobot 0.3.3 is not on this machine; `make conformance` builds its environment under the user's cache"
Work = Callable[[Any], object]


class LeRobotPeer(AbstractContextManager["LeRobotPeer"]):
    """lerobot's own environment, where there is one, answering questions (lerobot_peer.py); a folder for both sides."""

    def __init__(self, cores: AbstractContextManager[None]) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prts/venvs/lerobot-0.3.3"
        self.there = (home / "finished").is_file()  # written when the environment is whole
        if self.there:
            env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
            env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{self.folder}/cache", "HF_HOME": f"{self.folder}/hf"}
            env |= {"SVT_LOG": "1", "OMP_NUM_THREADS": "1"}
            command = [home / "bin/python", Path(__file__).with_name("lerobot_peer.py")]
            with cores:
                self.ask = self._stack.enter_context(Peer(command, env, self.folder / "log")).ask

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


@contextmanager
def one_core() -> Iterator[None]:
    """Hold this process, and what it starts, to one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class BarePyAV:
    """What one would write without a library: containers kept open, seek, decode up to the frame, RGB."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.containers, self.shape = [av.open(str(path)) for path in paths], VideoReformatter()
        for container in self.containers:
            container.streams.video[0].codec_context.thread_count = 1

    def frame(self, episode: int, row: int) -> np.ndarray:
        container = self.containers[episode]
        stream = container.streams.video[0]
        assert stream.average_rate is not None and stream.time_base is not None
        target = round(row / stream.average_rate / stream.time_base)
        container.seek(target, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts >= target:
                return self._rgb(frame)
        raise DataError("A video ends early", found=row)

    def epoch(self) -> Iterator[np.ndarray]:
        for container in self.containers:
            container.seek(0)
            yield from (self._rgb(frame) for frame in container.decode(video=0))

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        return self.shape.reformat(frame, format="rgb24", threads=1).to_ndarray()


def rows(console: Console) -> list[Row]:
    root = shared_folder() / "data/g1_bottle"
    if not root.is_dir():
        console.print("loading: g1_bottle is not on this machine ($PRTS_SHARED)")
        return []
    dataset = LeRobotDataset.open(root)
    camera = dataset.camera_keys[0]
    deltas = {"action": [n / dataset.fps for n in range(CHUNK)]}
    plain, floats = WindowDataset(dataset, deltas), WindowDataset(dataset, deltas, pictures="float32")
    bare = BarePyAV([root / dataset.info.video_file(episode, camera) for episode in dataset.episodes()])
    with LeRobotPeer(one_core()) as peer:
        calls = {"uint8": alone(plain.__getitem__), "float32": alone(floats.__getitem__)}
        if peer.there:
            peer.ask(do="open", root=str(root), deltas=deltas)
            console.print(f"loading: lerobot's pictures differ from ours by {_compare(peer, floats, camera):.2g} of 1")
            calls["lerobot"] = lambda indices: peer.ask(do="read", indices=indices)
        draws = np.random.default_rng(0).integers(0, len(plain), (ROUNDS + 1, ITEMS)).tolist()
        more = {
            "bare": alone(lambda index: bare.frame(*plain.locate(index))),
            "workers": lambda indices: seconds(lambda item: None, floats.ahead(indices, 2)),
        }
        random = {name: ITEMS / median(times) for name, times in interleave(more | calls, draws).items()}
        frames, size = bare.epoch(), -(-len(plain) // ROUNDS)
        slices = [list(range(first, min(first + size, len(plain)))) for first in range(0, len(plain), size)]
        with one_core():
            more = {"bare": lambda indices: seconds(lambda frame: None, islice(frames, len(indices)))}
            epoch = {name: len(plain) / sum(t) for name, t in interleave(more | calls, slices, warmups=0).items()}
    for windows in (plain, floats):
        windows.close()
    note = "" if peer.there else NO_LEROBOT
    return [
        Row(f"{what} / {peer_name}", seen[ours], seen.get(key), "items/s", "higher", goal, note if key else "")
        for what, seen, ours, key, peer_name, goal in (
            ("random windows of g1_bottle, float32", random, "float32", "lerobot", "lerobot", ">= 2"),
            ("random windows of g1_bottle, uint8", random, "uint8", "bare", "bare PyAV", ">= 0.95"),
            ("random windows of g1_bottle, float32, 2 workers", random, "workers", "lerobot", "lerobot", ">= 3.5"),
            ("epoch in order over g1_bottle, float32", epoch, "float32", "lerobot", "lerobot", ">= 6"),
            ("epoch in order over g1_bottle, uint8", epoch, "uint8", "bare", "bare PyAV", ">= 0.9"),
        )
    ]


def seconds(work: Work, over: Iterable[Any]) -> float:
    """For `work` on each of `over`."""
    begin = time.perf_counter()
    for value in over:
        work(value)
    return time.perf_counter() - begin


def alone(work: Work) -> Callable[[Iterable[Any]], float]:
    """`seconds` of `work`, on one core."""

    def timed(over: Iterable[Any]) -> float:
        with one_core():
            return seconds(work, over)

    return timed


def _compare(peer: LeRobotPeer, windows: WindowDataset, camera: str) -> float:
    """The largest difference of a picture; every other value must be lerobot's own."""
    indices = [0, 1, 101, len(windows) // 2, len(windows) - 1]
    peer.ask(do="save", indices=indices, out=str(peer.folder / "items.npz"))
    largest = 0.0
    with np.load(peer.folder / "items.npz") as theirs:
        for number, index in enumerate(indices):
            item = windows[index]
            if {f"{number}/{key}" for key in item} != {key for key in theirs.files if key.startswith(f"{number}/")}:
                raise DataError("Items have other keys than lerobot's", field=f"item {index}", found=sorted(item))
            for key, value in item.items():
                other = theirs[f"{number}/{key}"]
                if key == camera and value.shape == other.shape and value.dtype == other.dtype:
                    largest = max(largest, float(np.abs(value - other).max()))
                elif not np.array_equal(np.asarray(value), other):
                    raise DataError("An item differs from lerobot's", field=f"item {index}, {key}")
    if largest > 2.5 / 255:  # two builds of a decoder may round colours differently
        raise DataError("Pictures differ from lerobot's", field=camera, found=largest, expected="at most 2 / 255")
    return largest
