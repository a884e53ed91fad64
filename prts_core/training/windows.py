"""Read (episode, frame) windows of a dataset at random: numbers around a row, pictures at it, decoders kept warm.

A torch DataLoader takes a `WindowDataset` as it is; no torch is imported.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prts_core.data.ahead import in_order
from prts_core.data.images import resize_for_model
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import CODEBASE_VERSION
from prts_core.io.errors import ConfigError, DataError, PrtsError, suggest

TOLERANCE_S = 1e-4  # lerobot's: how far a delta may be from a whole number of frames
Window = dict[str, Any]


class FrameReader:
    """Pictures of a dataset by (episode, camera, row), from decoders that stay open. Safe for threads and forks."""

    def __init__(self, dataset: LeRobotDataset, max_open: int = 16) -> None:
        from prts_core.data.lerobot_v21.frames import VideoPool  # tables are read where PyAV is not installed, too

        joined = dataset.info.codebase_version != CODEBASE_VERSION
        self.dataset, self._pool = dataset, VideoPool(max_open, dataset.fps if joined else None)
        self._videos = frozenset(dataset.info.video_keys)
        self._places: dict[tuple[int, str], tuple[str, int]] = {}

    def rgb(self, episode: int, camera: str, row: int, size: int | tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8; size: as in LeRobotDataset.frames. DataError for a damaged or too short video."""
        if camera not in self._videos:
            return self.dataset.frames(episode, camera, [row], size)[0]
        path, first = self._place(episode, camera)
        with self._pool.video(path, first + row) as video:
            image = video.rgb(first + row)
        return image if size is None else resize_for_model(image[None], size)[0]

    def chw(self, episode: int, camera: str, row: int) -> np.ndarray:
        """(3, H, W) float32 in 0-1, as lerobot hands it out."""
        if camera not in self._videos:
            image = self.dataset.frames(episode, camera, [row])[0]
            return np.ascontiguousarray(image.transpose(2, 0, 1)) / np.float32(255)
        path, first = self._place(episode, camera)
        with self._pool.video(path, first + row) as video:
            return video.chw(first + row)

    def close(self) -> None:
        self._pool.close()

    def _place(self, episode: int, camera: str) -> tuple[Path, int]:
        """The video of an episode, and which of its frames is the first."""
        if (episode, camera) not in self._places:
            info = self.dataset.info
            self._places[episode, camera] = info.video_file(episode, camera), info.first_frame(episode, camera) or 0
        file, first = self._places[episode, camera]
        return self.dataset.path(file), first


class WindowDataset:
    """Every row of some episodes as one item, map-style: `len(d)`, `d[i]`, where i counts rows episode by episode.

    delta_timestamps: {key: seconds from the row}, as lerobot's: the key then holds one more leading axis, steps beyond
    the episode's ends repeat its first or last row, and `<key>_is_pad` (steps,) bool flags them.
    pictures: "uint8" gives (H, W, 3) uint8, "float32" gives (3, H, W) float32 in 0-1.
    cameras: none reads all. keys: number columns to read; none reads all. max_open: decoders kept warm. table_mib: rows
    of episodes kept in memory.

    An item is a dict of numpy arrays (scalars of a row: numpy scalars) and `task`, the row's sentence. The same index
    gives the same item in every thread and process. Raises ConfigError for keys that the dataset lacks and for deltas
    between frames, DataError where a file is damaged.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        delta_timestamps: Mapping[str, Sequence[float]] | None = None,
        *,
        episodes: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
        pictures: Literal["uint8", "float32"] = "uint8",
        max_open: int = 16,
        table_mib: float = 512.0,
    ) -> None:
        info = dataset.info
        self.dataset, self.pictures = dataset, pictures
        self.episodes = tuple(dataset.episodes() if episodes is None else episodes)
        self.cameras = tuple(info.camera_keys if cameras is None else cameras)
        told = {key for key, feature in info.features.items() if feature.dtype == "language"}  # rows of any form
        numbers = [key for key in info.features if not info.features[key].is_camera and key not in told]
        self.keys = tuple(dict.fromkeys([*(numbers if keys is None else keys), "task_index"]))
        for asked, allowed in ((self.cameras, info.camera_keys), (self.keys, numbers)):
            for key in asked:
                if key not in allowed:
                    raise _unknown(dataset, key, allowed)
        self.deltas = {key: self._steps(key, seconds) for key, seconds in (delta_timestamps or {}).items()}
        self.first = list(accumulate((dataset.length(e) for e in self.episodes), initial=0))
        self.frames = FrameReader(dataset, max_open)
        self._tables = _Tables(dataset, self.keys, table_mib)

    def _steps(self, key: str, seconds: Sequence[float]) -> np.ndarray:
        if key not in (*self.keys, *self.cameras):
            raise _unknown(self.dataset, key, (*self.keys, *self.cameras))
        exact = np.asarray(seconds, np.float64) * self.dataset.fps
        steps = np.rint(exact).astype(np.int64)
        wrong = np.abs(steps - exact) > TOLERANCE_S * self.dataset.fps
        if steps.ndim != 1 or not len(steps) or wrong.any():
            raise ConfigError(
                "A window falls between frames",
                file=self.dataset.root,
                field=f"delta_timestamps.{key}",
                found=list(seconds),
                expected=f"multiples of 1/{self.dataset.fps:g} s",
                cure="write [n / fps for n in ...]",
            )
        return steps

    def __len__(self) -> int:
        return self.first[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """(episode, row) of item `index`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        position = bisect_right(self.first, index) - 1
        return self.episodes[position], index - self.first[position]

    def __getitem__(self, index: int) -> Window:
        episode, row = self.locate(index)
        rows, table = self.dataset.length(episode), self._tables[episode]
        item: Window = {}
        for key in (*self.keys, *self.cameras):
            if key not in self.deltas:  # most keys: kept lean
                item[key] = table[key][row].copy() if key in table else self._picture(episode, key, row)
                continue
            wanted = row + self.deltas[key]
            if key in table:
                item[key] = table[key].take(wanted, axis=0, mode="clip")
            else:
                item[key] = self._pictures(episode, key, wanted.clip(0, rows - 1))
            item[f"{key}_is_pad"] = (wanted < 0) | (wanted >= rows)
        task = int(table["task_index"][row])
        if task not in self.dataset.tasks:
            raise DataError(
                "A row names a task that the dataset lacks",
                file=self.dataset.root / "meta" / "tasks.jsonl",
                field=f"episode {episode}, row {row}, task_index",
                found=task,
                expected=sorted(self.dataset.tasks)[:20],
            )
        item["task"] = self.dataset.tasks[task]
        return item

    def _picture(self, episode: int, camera: str, row: int) -> np.ndarray:
        return (self.frames.chw if self.pictures == "float32" else self.frames.rgb)(episode, camera, row)

    def _pictures(self, episode: int, camera: str, at: np.ndarray) -> np.ndarray:
        order, back = np.unique(at, return_inverse=True)  # ascending, so that a decoder goes on where it stands
        return np.stack([self._picture(episode, camera, int(row)) for row in order])[back]

    def ahead(self, indices: Iterable[int], workers: int = 2, depth: int = 4) -> Generator[Window, None, None]:
        """Items at `indices`, in this order, made by `workers` threads up to `depth` runs each before they are asked
        for; 0 makes them when asked. A fault is raised at its item's place."""
        if not workers:
            yield from (self[index] for index in indices)
            return
        for items, fault in in_order(self._run, _runs(indices, depth), workers, depth):
            yield from items
            if fault is not None:
                raise fault

    def _run(self, indices: Sequence[int]) -> tuple[list[Window], PrtsError | IndexError | None]:
        items: list[Window] = []
        try:
            for index in indices:
                items.append(self[index])
        except (PrtsError, IndexError) as fault:  # raised where the items before it have been handed out
            return items, fault
        return items, None

    def close(self) -> None:
        """Close the decoders; reading on opens them anew."""
        self.frames.close()


class _Tables:
    """Columns of the episodes read last, within a memory limit."""

    def __init__(self, dataset: LeRobotDataset, keys: Sequence[str], mib: float) -> None:
        self.dataset, self.keys, self.mib = dataset, tuple(keys), mib
        self._kept: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._bytes, self._lock, self._process = 0, threading.Lock(), os.getpid()

    def __getitem__(self, episode: int) -> dict[str, np.ndarray]:
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self.__init__(**self.__getstate__())  # type: ignore[misc]
        with self._lock:
            if episode in self._kept:
                self._kept.move_to_end(episode)
                return self._kept[episode]
        table = self.dataset.columns(episode, self.keys)
        with self._lock:
            if episode not in self._kept:
                self._kept[episode] = table
                self._bytes += _size(table)
            while self._bytes > self.mib * 2**20 and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "keys": self.keys, "mib": self.mib}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _runs(indices: Iterable[int], most: int) -> Iterator[list[int]]:
    """Stretches of rows that follow each other, at most `most` long: one thread takes one, and decodes nothing
    twice."""
    run: list[int] = []
    for index in indices:
        if run and (index != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _size(table: Mapping[str, np.ndarray]) -> int:
    return sum(column.nbytes for column in table.values())


def _unknown(dataset: LeRobotDataset, key: str, allowed: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"The dataset has no such feature{suggest(key, allowed)}",
        file=dataset.root / "meta" / "info.json",
        field=key,
        expected=", ".join(allowed),
    )
