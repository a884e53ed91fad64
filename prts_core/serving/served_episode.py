"""Gather one session's looks into the rows of an episode: pictures in files beside the dataset, the rest in memory.

A client that counts its control steps gives rows at the control rate: row j holds the action for step j, what was seen
at the last look, and `observed` says whether that look was at this very step. Of any other client a row is a look and
its action is the first one of the chunk that was answered.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from prts_core.contract import PolicyContract
from prts_core.serving.observations import Observation
from prts_core.value.alarm import State

ALARMS = get_args(State)  # 0, 1, 2 of the column `alarm`; -1: none was told
MOST_LOOKS = 1000  # of an episode; what comes after begins another
MOST_RATE = 1000  # looks a second that are told apart


@dataclass(frozen=True)
class Look:
    """One answer. session: which it belongs to. actions (chunk, A). at: seconds of a clock that goes on evenly.

    after_hole: looks of this session were dropped just before it, so that it goes on with no episode.
    """

    session: int
    name: str
    version: str
    digest: str
    at: float
    observation: Observation
    actions: np.ndarray
    value: float | None
    alarm: State | None
    after_hole: bool = False

    @property
    def size(self) -> int:
        """Bytes of its pictures."""
        return sum(picture.nbytes for picture in self.observation.images.values())


def without_pictures(look: Look) -> Look:
    return replace(look, observation=replace(look.observation, images={}))


class Repeated:
    """Pictures (N, H, W, 3) of which some stand for several rows (T,); it is read as the array (T, H, W, 3) is."""

    def __init__(self, pictures: np.ndarray, at: np.ndarray) -> None:
        self.pictures, self.at = pictures, at
        self.shape, self.dtype, self.ndim = (len(at), *pictures.shape[1:]), pictures.dtype, pictures.ndim

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.pictures[self.at[rows]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.pictures[at] for at in self.at)


class OpenEpisode:
    """An episode under way. folder: of its own, for the pictures."""

    def __init__(self, folder: Path, contract: PolicyContract, first: Look) -> None:
        self.folder, self.contract, self.first, self.last = folder, contract, first, first
        self.counted = first.observation.step is not None
        self.size = 0
        self._rows: list[tuple[int, Look, np.ndarray]] = []  # number of the look, the look, the action
        self._looks: list[Look] = []
        folder.mkdir(parents=True)
        self._files = {
            camera.key: (folder / f"{number}.raw").open("wb") for number, camera in enumerate(contract.contract.cameras)
        }
        self._keep(first)

    def goes_on(self, look: Look) -> bool:
        """Whether the look is this episode's next one: the same task, and no step between that nobody knows of."""
        if look.observation.prompt != self.first.observation.prompt or len(self._looks) >= MOST_LOOKS:
            return False
        if look.after_hole or (look.observation.step is not None) != self.counted:
            return False
        return 0 <= self._since(look) <= len(self.last.actions)

    def add(self, look: Look) -> None:
        """One for which `goes_on` is true."""
        since = self._since(look)
        self._act(since)
        if since == 0:  # asked again before anything was executed: what was seen then counts, what was said now
            self.last = self._looks[-1] = without_pictures(look)
            return
        self._keep(look)

    def close(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """({feature: (T, ...)}, {camera: pictures (T, H, W, 3)}); none where there are fewer than two looks."""
        for file in self._files.values():
            file.close()
        if len(self._looks) < 2:
            return None
        self._act(1)  # of the last chunk nobody knows how much was executed
        at = np.array([number for number, _, _ in self._rows])
        looks, actions = [look for _, look, _ in self._rows], np.stack([action for _, _, action in self._rows])
        states = np.stack([look.observation.state for look in looks])
        told = [look.value if look.value is not None and math.isfinite(look.value) else None for look in looks]
        columns = {
            "observation.state": states,
            "action": actions.astype(np.float32),
            "value": np.array([value or 0.0 for value in told], np.float32),
            "value_told": np.array([value is not None for value in told], np.int64),
            "alarm": np.array([ALARMS.index(look.alarm) if look.alarm else -1 for look in looks], np.int64),
            "observed": np.concatenate([[1], np.diff(at) > 0]).astype(np.int64),
            "look_time": np.array([look.at - self.first.at for look in looks], np.float32),
        }
        pictures = {}
        for key, file in self._files.items():
            camera = next(camera for camera in self.contract.contract.cameras if camera.key == key)
            form = (len(self._looks), camera.height, camera.width, 3)
            pictures[key] = Repeated(np.memmap(file.name, np.uint8, "r", shape=form), at)
        return columns, pictures

    def remove(self) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def rate(self) -> int:
        """Looks a second, rounded: what one row's time is, where a row is a look."""
        between = np.diff([look.at for look in self._looks])
        seconds = float(np.median(between)) if len(between) else 1.0
        return int(np.clip(round(1 / max(seconds, 1 / MOST_RATE)), 1, MOST_RATE))

    def _since(self, look: Look) -> int:
        """Rows that the last chunk gives until this look."""
        if not self.counted:
            return 1
        assert look.observation.step is not None and self.last.observation.step is not None
        return look.observation.step - self.last.observation.step

    def _act(self, rows: int) -> None:
        self._rows += [(len(self._looks) - 1, self.last, action) for action in self.last.actions[:rows]]

    def _keep(self, look: Look) -> None:
        self.last = without_pictures(look)
        self._looks.append(self.last)
        for key, file in self._files.items():
            file.write(look.observation.images[key].tobytes())
            self.size += look.observation.images[key].nbytes
