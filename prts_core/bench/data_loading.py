"""Windows of g1_bottle: ours beside bare PyAV (uint8 pictures) and lerobot 0.3.3 (float32, equal to its own items).

Peers are held to one core, as ours is but in the rows of two workers; all take turns over the same items.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from rich.console import Console

from prts_core.bench.report import Row
from prts_core.config.places import shared_folder
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import DataError
from prts_core.training.windows import WindowDataset

ROUNDS, ITEMS, CHUNK = 9, 24, 50
NO_LEROBOT = "lerobot 0.3.3 is not on this machine; `make conformance` builds its environment under the user's cache"


class LeRobotPeer(AbstractContextManager["LeRobotPeer"]):
    """lerobot's own environment, where there is one, answering questions (lerobot_peer.py)."""

    def __init__(self, cores: AbstractContextManager[None]) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.home, self._folder = cache / "prts/venvs/lerobot-0.3.3", tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self._process: subprocess.Popen[str] | None = None
        if not (self.home / "finished").is_file():  # written when the environment is whole
            return
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        kept |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{self.folder}/cache", "HF_HOME": f"{self.folder}/hf"}
        kept |= {"SVT_LOG": "1", "OMP_NUM_THREADS": "1"}
        with cores:
            self._process = subprocess.Popen(
                [self.home / "bin/python", Path(__file__).with_name("lerobot_peer.py")],
                env=kept,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(self.folder / "log").open("w"),
            )

    @property
    def there(self) -> bool:
        return self._process is not None

    def ask(self, do: str, **asked: Any) -> Any:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **asked}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise DataError("lerobot gave up", found=(self.folder / "log").read_text()[-2000:], cure="make conformance")
        return json.loads(line)

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(60)
        self._folder.cleanup()


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
    plain = WindowDataset(dataset, deltas)
    floats = WindowDataset(dataset, deltas, pictures="float32")
    bare = BarePyAV([root / dataset.info.video_file(episode, camera) for episode in dataset.episodes()])
    with LeRobotPeer(one_core()) as peer:
        if peer.there:
            peer.ask("open", root=str(root), deltas=deltas)
            console.print(f"loading: lerobot's pictures differ from ours by {_compare(peer, floats, camera):.2g} of 1")
        random = _random(plain, floats, bare, peer)
        sequential = _sequential(plain, floats, bare, peer)
    plain.close()
    floats.close()
    made = []
    for what, seen, bounds in (
        ("random windows of g1_bottle", random, (">= 2", ">= 0.95", ">= 3.5")),
        ("epoch in order over g1_bottle", sequential, (">= 6", ">= 0.9", None)),
    ):
        note = "" if peer.there else NO_LEROBOT
        made.append(_row(f"{what}, float32 / lerobot", seen, "float32", "lerobot", bounds[0], note))
        made.append(_row(f"{what}, uint8 / bare PyAV", seen, "uint8", "bare", bounds[1]))
        if bounds[2] is not None:
            made.append(_row(f"{what}, float32, 2 workers / lerobot", seen, "workers", "lerobot", bounds[2], note))
    return made


def _row(what: str, seen: dict[str, float], ours: str, peer: str, goal: str | None, note: str = "") -> Row:
    return Row(what, seen[ours], seen.get(peer), "items/s", "higher", goal or ">= 1", note)


def _compare(peer: LeRobotPeer, windows: WindowDataset, camera: str) -> float:
    """The largest difference of a picture; every other value must be lerobot's own."""
    indices = [0, 1, 101, len(windows) // 2, len(windows) - 1]
    peer.ask("save", indices=indices, out=str(peer.folder / "items.npz"))
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


def _timed(work: Callable[[Any], object], over: Iterable[Any]) -> float:
    """Seconds for `work` on each of `over`."""
    begin = time.perf_counter()
    for value in over:
        work(value)
    return time.perf_counter() - begin


def _random(plain: WindowDataset, floats: WindowDataset, bare: BarePyAV, peer: LeRobotPeer) -> dict[str, float]:
    """Items a second, the median of rounds."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        indices = [int(index) for index in rng.integers(0, len(plain), ITEMS)]
        places = [plain.locate(index) for index in indices]
        with one_core():
            found = {
                "bare": _timed(lambda place: bare.frame(*place), places),
                "uint8": _timed(plain.__getitem__, indices),
                "float32": _timed(floats.__getitem__, indices),
            }
            if peer.there:
                found["lerobot"] = peer.ask("read", indices=indices)
        found["workers"] = _timed(lambda item: None, floats.ahead(indices, 2))
        for name, value in found.items():
            seconds.setdefault(name, []).extend([value] if turn else [])  # the first round warms everything
    return {name: ITEMS / median(values) for name, values in seconds.items()}


def _sequential(plain: WindowDataset, floats: WindowDataset, bare: BarePyAV, peer: LeRobotPeer) -> dict[str, float]:
    """Items a second over one whole epoch, in slices by turns."""
    seconds: dict[str, float] = {}
    frames = bare.epoch()
    size = -(-len(plain) // ROUNDS)
    with one_core():
        for first in range(0, len(plain), size):
            indices = list(range(first, min(first + size, len(plain))))
            found = {
                "bare": _timed(lambda frame: None, islice(frames, len(indices))),
                "uint8": _timed(plain.__getitem__, indices),
                "float32": _timed(floats.__getitem__, indices),
            }
            if peer.there:
                found["lerobot"] = peer.ask("read", indices=indices)
            for name, value in found.items():
                seconds[name] = seconds.get(name, 0.0) + value
    return {name: len(plain) / value for name, value in seconds.items()}
