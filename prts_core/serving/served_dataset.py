"""Append episodes to a LeRobot v2.1 dataset, and put right what a kill left.

An episode's files are written beside the dataset and moved in; then it is noted in a list of records, from which the
metadata are written: after each of the first episodes, then once a certain part of all is new, so that what an episode
costs does not grow with the dataset. Until then the metadata tell of the episodes before. What begins with a dot is no
part of a dataset.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.schema import VideoConfig
from prts_core.contract import Contract, require_equal
from prts_core.data.lerobot_v21.schema import ACTION, STATE
from prts_core.data.lerobot_v21.seal import SEAL, read_seal
from prts_core.data.lerobot_v21.writer import EpisodeToWrite, Layout, finish, video_feature, write_episode
from prts_core.io.files import cut_torn_line, read_json, read_jsonl
from prts_core.serving.served_episode import Look

RECORDS, NEW = ".records.jsonl", ".new"
NEW_PART = 1 / 16  # of the episodes, whose metadata are not written yet
NUMBERS = {"value": "float32", "value_told": "int64", "alarm": "int64", "observed": "int64", "look_time": "float32"}


class ServedDataset:
    """A dataset of one contract at `root`, made where there is none. size: bytes of its files."""

    def __init__(self, root: Path, contract: Contract) -> None:
        self.root, self.contract = root, contract
        self.layout = layout(root, contract)
        if (root / "meta" / "contract.json").is_file():
            there = Contract.load(root / "meta" / "contract.json")
            require_equal(there, contract, left_name=f"the dataset {root}", right_name="the policy that is served")
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(root / NEW, ignore_errors=True)
        cut_torn_line(root / RECORDS)
        self.records: list[dict[str, Any]] = read_jsonl(root / RECORDS) if (root / RECORDS).exists() else []
        self._tasks = {record["row"]["tasks"][0]: record["task_index"] for record in self.records}
        self._rows = sum(record["row"]["length"] for record in self.records)
        self._told = len(self.records) if self._is_finished() else 0  # episodes that the metadata tell of
        self.size = _size(root)
        self.finish()

    def add(self, columns: dict[str, np.ndarray], pictures: dict[str, Any], first: Look) -> None:
        """Write an episode; it is kept when this returns, and not before. `finish` makes it part of the metadata."""
        task = first.observation.prompt
        began = time.time() - (time.monotonic() - first.at)
        episode = EpisodeToWrite(
            index=len(self.records),
            start=self._rows,
            key=first.name,
            task=task,
            task_index=self._tasks.get(task, len(self._tasks)),
            columns={key: columns[key] for key in self.layout.features if key in columns},
            images=pictures,
            extra={
                "policy_version": first.version,
                "package_digest": first.digest,
                "session": first.name,
                "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            },
        )
        beside = replace(self.layout, root=self.root / NEW)
        record = write_episode(beside, episode)
        for name in self.layout.files(episode.index):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (beside.root / name).replace(self.root / name)
            self.size += (self.root / name).stat().st_size
        with (self.root / RECORDS).open("a") as file:
            self.size += file.write(json.dumps(record, allow_nan=False) + "\n")  # ASCII: a byte a character
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        self._tasks[task] = episode.task_index
        self._rows += episode.length
        if len(self.records) - self._told >= NEW_PART * len(self.records):
            self.finish()

    def finish(self) -> None:
        """Write the metadata of every episode, where they do not tell of all."""
        if self._told == len(self.records):
            return
        before = _size(self.root / "meta")
        sealed = {} if not (self.root / SEAL).is_file() else read_seal(self.root) or {}
        known = {name: entry.sha256 for name, entry in sealed.items() if not name.startswith("meta/")}
        finish(self.layout, self.records, {"train": range(len(self.records))}, self.contract, known)
        self.size += _size(self.root / "meta") - before
        self._told = len(self.records)

    def _is_finished(self) -> bool:
        """Whether the metadata tell of every episode: the seal is written last."""
        info = self.root / "meta" / "info.json"
        sealed = (self.root / SEAL).is_file() and info.is_file()
        return sealed and read_json(info)["total_episodes"] == len(self.records)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def layout(root: Path, contract: Contract) -> Layout:
    """What a dataset of these sessions is made of."""
    named = ((STATE, contract.state), (ACTION, contract.action))
    features: dict[str, dict[str, Any]] = {
        key: {"dtype": "float32", "shape": [len(dims)], "names": [dim.name for dim in dims]}
        for key, dims in named
        if dims
    }
    odd = any(side % 2 for camera in contract.cameras for side in (camera.height, camera.width))
    video = VideoConfig(pixel_format="yuv444p") if odd else VideoConfig()
    for camera in contract.cameras:
        features[camera.key] = video_feature(camera.height, camera.width, contract.control_hz, video)
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in NUMBERS.items()}
    return Layout(root, features, contract.control_hz, contract.embodiment, video)
