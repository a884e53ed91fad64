"""Time the validation of 1,000 sealed episodes of two cameras, checked whole but for the pictures."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from prts_core.bench.report import Row
from prts_core.contract import Camera, Contract, Dimension
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.writer import (
    EpisodeToWrite,
    Layout,
    episode_stats,
    finish,
    record,
    standard_columns,
    video_feature,
    write_table,
)
from prts_core.data.validation import validate_dataset

EPISODES, ROWS, WIDTH, SIDE, FPS = 1000, 300, 14, 128, 30.0
GOAL_MS = 10.0
CAMERAS = ("observation.images.top", "observation.images.wrist")
_REPEATS = 3


def rows(console: Console) -> list[Row]:
    """One row: milliseconds an episode, the best of three runs, against the goal of 10."""
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"writing {EPISODES} episodes of {ROWS} rows, {len(CAMERAS)} cameras ...")
        root = make(Path(folder), EPISODES)
        times = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            report = validate_dataset(root, "packets")
            times.append((time.perf_counter() - begin) * 1e3 / EPISODES)
            assert report.ok, report.markdown()
    what = f"validation of {EPISODES:,} episodes ({ROWS} rows, {len(CAMERAS)} cameras, sealed), no video decoded"
    return [Row(f"{what}; peer: the goal", min(times), GOAL_MS, "ms/episode", "lower", "< 1")]


def make(folder: Path, episodes: int) -> Path:
    """A dataset of smooth random motion in <folder>/data. All episodes share their videos' bytes by hard links."""
    pictures = np.random.default_rng(0).integers(0, 255, (ROWS, 8, 8, 3), np.uint8).repeat(SIDE // 8, 1)
    pictures = pictures.repeat(SIDE // 8, 2)
    dimensions = tuple(Dimension(f"joint_{index}", "rad") for index in range(WIDTH))
    vector = {"dtype": "float32", "shape": [WIDTH], "names": [dimension.name for dimension in dimensions]}
    layout = Layout(folder / "data", {"observation.state": vector, "action": vector}, FPS, "bench")
    layout.features.update({camera: video_feature(SIDE, SIDE, FPS, layout.video) for camera in CAMERAS})
    numbers = {key: feature for key, feature in layout.all_features.items() if key not in CAMERAS}
    records = []
    for index in range(episodes):
        rng = np.random.default_rng(index)
        state = np.cumsum(rng.normal(0, 0.01, (ROWS, WIDTH)), 0).astype(np.float32)
        action = state + rng.normal(0, 0.01, state.shape).astype(np.float32)
        vectors = {"observation.state": state, "action": action}
        episode = EpisodeToWrite(index, index * ROWS, "bench", "move", 0, vectors, {})
        columns = vectors | standard_columns(episode, FPS)
        table, *videos = (layout.root / file for file in layout.files(index))
        write_table(table, columns, numbers)
        for path, first in zip(videos, layout.files(0)[1:], strict=True):
            if index:
                os.link(layout.root / first, path)
            else:
                video.encode(path, pictures, FPS, layout.video)
        records.append(record(episode, episode_stats(columns, numbers)))
    views = tuple(Camera(key, key.rsplit(".", 1)[-1], SIDE, SIDE) for key in CAMERAS)
    finish(layout, records, {"train": range(episodes)}, Contract("bench", FPS, dimensions, dimensions, views))
    return layout.root
