"""`prts bench data`, row validation: 1,000 sealed episodes of two cameras, checked whole but for the pictures."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from prts_core.bench.report import Row
from prts_core.config.schema import VideoConfig
from prts_core.contract import Camera, Contract, Dimension
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.schema import CHUNKS_SIZE, CODEBASE_VERSION, DATA_PATH, STANDARD_FEATURES, VIDEO_PATH
from prts_core.data.lerobot_v21.writer import Layout, episode_stats, video_feature, write_meta, write_table
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
    names = [f"joint_{index}" for index in range(WIDTH)]
    vector = {"dtype": "float32", "shape": [WIDTH], "names": names}
    config, numbers = VideoConfig(), {"observation.state": vector, "action": vector}
    cameras = {camera: video_feature(SIDE, SIDE, FPS, config) for camera in CAMERAS}
    layout = Layout(folder / "data", folder / "state", numbers | cameras, FPS, "bench", config)
    columns_of = numbers | STANDARD_FEATURES
    lines, stats = [], []
    for index in range(episodes):
        rng, rows = np.random.default_rng(index), np.arange(ROWS)
        state = np.cumsum(rng.normal(0, 0.01, (ROWS, WIDTH)), 0).astype(np.float32)
        columns: dict[str, np.ndarray] = {
            "observation.state": state,
            "action": state + rng.normal(0, 0.01, state.shape).astype(np.float32),
            "timestamp": (rows / FPS).astype(np.float32),
            "frame_index": rows,
            "episode_index": np.full(ROWS, index),
            "index": index * ROWS + rows,
            "task_index": np.zeros(ROWS, np.int64),
        }
        write_table(layout.root / layout.data_file(index), columns, columns_of)
        for camera in CAMERAS:
            path, first = (layout.root / layout.video_file(number, camera) for number in (index, 0))
            if index:
                os.link(first, path)
            else:
                video.encode(path, pictures, FPS, config)
        lines.append({"episode_index": index, "tasks": ["move"], "length": ROWS})
        stats.append({"episode_index": index, "stats": episode_stats(columns, columns_of)})
    dimensions = tuple(Dimension(name, "rad") for name in names)
    views = tuple(Camera(key, key.rsplit(".", 1)[-1], SIDE, SIDE) for key in CAMERAS)
    contract = Contract("bench", FPS, dimensions, dimensions, views)
    info = {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": "bench",
        "total_episodes": episodes,
        "total_frames": episodes * ROWS,
        "total_tasks": 1,
        "total_videos": episodes * len(CAMERAS),
        "total_chunks": 1,
        "chunks_size": CHUNKS_SIZE,
        "fps": int(FPS),
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": layout.all_features,
    }
    write_meta(layout.root, info, lines, {0: "move"}, stats, contract)
    return layout.root
