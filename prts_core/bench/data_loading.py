"""Time the samples that training draws of g1_bottle, beside bare PyAV's pictures and lerobot 0.3.3's items.

Samples are whole (pictures at the camera's own size, state, words, normalised chunk); the peer gives the picture alone,
or its items. Peers are held to one core, as ours is; all take turns over the same batches of rows.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from rich.console import Console

from prts_core.bench.peer import Peer
from prts_core.bench.report import Row, interleave
from prts_core.config.model import ModelConfig
from prts_core.config.places import shared_folder
from prts_core.contract import PolicyContract
from prts_core.data.embodiment import build_contract
from prts_core.data.index import DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import ACTION, STATE
from prts_core.data.normalize import FeatureStats, NormStats
from prts_core.io.errors import DataError
from prts_core.io.files import digest_file, write_json
from prts_core.policy.processor import Processor, load_statistics
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.datasets import RobotDataset
from prts_core.training.shared_files import SharedFiles

ROUNDS, ITEMS, CHUNK = 9, 24, 50
NO_LEROBOT = "lerobot 0.3.3 is not on this machine; `make conformance` builds its environment under the user's cache"
WHAT = "random samples of g1_bottle, as training draws them"
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

    def __init__(self, paths: Mapping[Any, Path]) -> None:
        self.containers, self.shape = {key: av.open(str(path)) for key, path in paths.items()}, VideoReformatter()
        for container in self.containers.values():
            container.streams.video[0].codec_context.thread_count = 1

    def frame(self, key: Any, row: int) -> np.ndarray:
        container = self.containers[key]
        stream = container.streams.video[0]
        assert stream.average_rate is not None and stream.time_base is not None
        target = round(row / stream.average_rate / stream.time_base)
        container.seek(target, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts >= target:
                return self.shape.reformat(frame, format="rgb24", threads=1).to_ndarray()
        raise DataError("A video ends early", found=row)


def training_set(dataset: LeRobotDataset, folder: Path) -> RobotDataset:
    """`dataset` as training draws from it, its pictures at their own size and none of them kept."""
    features = dataset.info.features
    dataset.contract = build_contract(
        dataset="bench",
        robot=None,
        robot_type="bench",
        control_hz=dataset.fps,
        state=features[STATE].dimension_names,
        action=features[ACTION].dimension_names,
        cameras={key: features[key].image_size for key in dataset.camera_keys},
    )
    numbers = [np.concatenate([read(e) for e in dataset.episodes()]) for read in (dataset.states, dataset.actions)]
    processor = make_processor(dataset, numbers[0], numbers[1], folder)
    index, shared = DatasetIndex.of(dataset), SharedFiles(left=0)
    return RobotDataset("bench", dataset, index, processor, dataset.episodes(), shared=shared)


def make_processor(dataset: LeRobotDataset, states: np.ndarray, actions: np.ndarray, folder: Path) -> Processor:
    """With the statistics of these rows; its tokenizers know little."""
    model = ModelConfig(min_view_tokens=1, max_view_tokens=10**6, chunk_length=CHUNK)
    state, action = (
        FeatureStats(x.mean(0), x.std(0), x.min(0), x.max(0), *np.quantile(x, [0.01, 0.99], axis=0))
        for x in (states, actions)
    )
    path = folder / "norm_stats.json"
    write_json(path, NormStats(state, action, len(states), "train", "sha256:bench").to_json())
    contract = PolicyContract("bench", dataset.contract, CHUNK, "QUANTILE", digest_file(path))
    fast = FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (50, 8, 7)), 512)
    labels = [camera.label for camera in dataset.contract.cameras]
    text = TextTokenizer.train(sorted(set(dataset.tasks.values()))[:100], labels, 400, fast.vocab_size)
    return Processor(contract, load_statistics(path), path, text, fast, model)


def rows(console: Console) -> list[Row]:
    root = shared_folder() / "data/g1_bottle"
    if not root.is_dir():
        console.print("loading: g1_bottle is not on this machine ($PRTS_SHARED)")
        return []
    dataset = LeRobotDataset.open(root)
    deltas = {"action": [n / dataset.fps for n in range(CHUNK)]}
    paths = {
        (e, key): root / dataset.info.video_file(e, key) for e in dataset.episodes() for key in dataset.camera_keys
    }
    bare = BarePyAV(paths)
    with LeRobotPeer(one_core()) as peer:
        data = training_set(dataset, peer.folder)
        generator = np.random.default_rng(0)

        def samples(indices: list[int]) -> object:
            return data.items(indices, [generator] * len(indices), response=False, contrastive=False)

        def pictures(indices: list[int]) -> object:
            rows = zip(*data.places(np.array(indices)), strict=True)
            return [bare.frame((episode, camera), row) for episode, row in rows for camera in dataset.camera_keys]

        calls = {"ours": alone(samples), "bare": alone(pictures)}
        if peer.there:
            peer.ask(do="open", root=str(root), deltas=deltas)
            console.print(f"loading: lerobot's pictures differ from ours by {compare(peer, data):.2g} of 1")
            calls["lerobot"] = lambda indices: peer.ask(do="read", indices=indices)
        draws = generator.integers(0, len(data), (ROUNDS + 1, ITEMS)).tolist()
        seen = {name: ITEMS / median(times) for name, times in interleave(calls, draws).items()}
    data.reader.close()
    return [
        Row(f"{WHAT} / {name}", seen["ours"], seen.get(key), "samples/s", "higher", goal, note)
        for key, name, goal, note in (
            ("bare", "bare PyAV's pictures", ">= 0.95", ""),
            ("lerobot", "lerobot", ">= 2", "" if peer.there else NO_LEROBOT),
        )
    ]


def alone(work: Work) -> Callable[[Any], float]:
    """Seconds for `work`, on one core."""

    def timed(over: Any) -> float:
        with one_core():
            begin = time.perf_counter()
            work(over)
            return time.perf_counter() - begin

    return timed


def compare(peer: LeRobotPeer, data: RobotDataset) -> float:
    """The largest difference of a picture, of 1; the rows of a chunk and their padding must be lerobot's own."""
    indices = [0, 1, 101, len(data) // 2, len(data) - 1]
    peer.ask(do="save", indices=indices, out=str(peer.folder / "items.npz"))
    largest = 0.0
    with np.load(peer.folder / "items.npz") as theirs:
        for number, index in enumerate(indices):
            (episode,), (row,) = data.places(np.array([index]))
            actions = data.reader.numbers(episode)[1]
            steps = row + np.arange(CHUNK)
            own = {"action": actions[steps.clip(max=len(actions) - 1)], "action_is_pad": steps >= len(actions)}
            for key, value in own.items():
                if not np.array_equal(value, theirs[f"{number}/{key}"]):
                    raise DataError("A sample differs from lerobot's item", field=f"item {index}, {key}")
            for key, picture in zip(data.processor.view_sizes, data.pictures(index), strict=True):
                other = theirs[f"{number}/{key}"]
                largest = max(largest, float(np.abs(picture.transpose(2, 0, 1) / np.float32(255) - other).max()))
    if largest > 2.5 / 255:  # two builds of a decoder may round colours differently
        raise DataError("Pictures differ from lerobot's", found=largest, expected="at most 2 / 255")
    return largest
