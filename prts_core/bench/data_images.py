"""Time single pictures of a dataset that keeps them in its tables, beside decoding the same bytes from memory."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

from prts_core.bench.data_loading import alone
from prts_core.bench.report import Row, interleave
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import STATE, data_file
from prts_core.data.lerobot_v21.tables import read_pictures
from prts_core.data.lerobot_v21.writer import EpisodeToWrite, Layout, finish, image_feature, write_episode

EPISODES, LENGTH, SIDE, ROUNDS, ITEMS, CAMERA = 4, 200, 256, 9, 24, "observation.images.top"


def rows(console: Console) -> list[Row]:
    """Two rows: of tables as we write them, and as others do, where one picture costs the row group that it lies in."""
    what, unit, found = f"random pictures of {SIDE} x {SIDE} pixels in tables", "ms a picture", []
    with tempfile.TemporaryDirectory() as folder:
        dataset = made(Path(folder), EPISODES, LENGTH, SIDE)
        files = [Path(folder) / data_file(number) for number in range(EPISODES)]
        stored = [read_pictures(file, CAMERA, range(LENGTH)) for file in files]
        draws = np.random.default_rng(0).integers(0, EPISODES * LENGTH, (ROUNDS + 1, ITEMS)).tolist()
        calls = {
            "ours": alone(lambda drawn: [dataset.frames(n // LENGTH, CAMERA, [n % LENGTH]) for n in drawn]),
            "decode": alone(lambda drawn: [decoded(stored[n // LENGTH][n % LENGTH]) for n in drawn]),
        }
        for layout in ("", " of one row group each, as others write them"):
            if layout:
                for file in files:
                    pq.write_table(pq.read_table(file), file)
            times = {name: median(took) / ITEMS * 1e3 for name, took in interleave(calls, draws).items()}
            found.append(
                Row(f"{what}{layout} / their own decode", times["ours"], times["decode"], unit, "lower", "<= 1.3")
            )
    return found


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def made(root: Path, episodes: int, length: int, side: int) -> LeRobotDataset:
    """A dataset of one image column: drifting colours and sensor noise, as a PNG of a camera has them."""
    rng = np.random.default_rng(1)
    state = {"dtype": "float32", "shape": [8], "names": None}
    layout = Layout(root, {STATE: state, CAMERA: image_feature(side, side)}, 10.0, "bench")
    records = []
    for number in range(episodes):
        corners = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        base = np.asarray(corners.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        noise = rng.integers(-4, 5, (length, side, side, 3), dtype=np.int8)
        numbers = rng.normal(size=(length, 8)).astype(np.float32)
        images = np.clip(base + noise, 0, 255).astype(np.uint8)
        episode = EpisodeToWrite(number, number * length, f"{number}", "look", 0, {STATE: numbers}, {CAMERA: images})
        records.append(write_episode(layout, episode))
    finish(layout, records, {"train": range(episodes)}, None)
    return LeRobotDataset.open(root)
