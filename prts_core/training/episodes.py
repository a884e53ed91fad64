"""Read numbers and pictures of a dataset at any row: tables read lately stay in memory, decoders stay open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from prts_core.data.images import resize_for_model
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import ACTION, STATE

TABLE_MIB = 64.0  # of the episodes read last, a process: 16,000 rows of 1,000 numbers
Numbers = tuple[np.ndarray, np.ndarray]


class EpisodeReader:
    """A dataset by (episode, row). Safe for threads; after a fork the child reads with handles of its own."""

    def __init__(self, dataset: LeRobotDataset, max_open: int = 16, table_mib: float = TABLE_MIB) -> None:
        from prts_core.data.lerobot_v21.frames import VideoPool  # tables are read where PyAV is not installed, too

        self.dataset, self.max_open, self.table_mib = dataset, max_open, table_mib
        self._pool = VideoPool(max_open, dataset.joined_fps)
        self._videos = frozenset(dataset.info.video_keys)
        self._begin()

    def _begin(self) -> None:
        self._tables: OrderedDict[int, Numbers] = OrderedDict()
        self._bytes, self._lock, self._process = 0, threading.Lock(), os.getpid()

    def numbers(self, episode: int) -> Numbers:
        """States (T, D) and actions (T, A) of an episode, float32. DataError for a damaged table."""
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._begin()
        with self._lock:
            if episode in self._tables:
                self._tables.move_to_end(episode)
                return self._tables[episode]
        columns = self.dataset.columns(episode, [STATE, ACTION])
        states, actions = (
            values.reshape(len(values), -1).astype(np.float32, copy=False)
            for values in (columns[STATE], columns[ACTION])
        )
        with self._lock:
            if episode not in self._tables:
                self._tables[episode] = (states, actions)
                self._bytes += states.nbytes + actions.nbytes
            while self._bytes > self.table_mib * 2**20 and len(self._tables) > 1:
                self._bytes -= sum(part.nbytes for part in self._tables.popitem(last=False)[1])
        return states, actions

    def rgb(self, episode: int, camera: str, row: int, size: int | tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8; size: as in LeRobotDataset.frames. DataError for a damaged or too short video."""
        if camera not in self._videos:
            return self.dataset.frames(episode, camera, [row], size)[0]
        path, number = self.dataset.video_frame(episode, camera, row)
        with self._pool.video(path, number) as video:
            image = video.rgb(number)
        return image if size is None else resize_for_model(image[None], size)[0]

    def close(self) -> None:
        """Close the decoders; reading on opens them anew."""
        self._pool.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "max_open": self.max_open, "table_mib": self.table_mib}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
