"""Time statistics of 5M rows x 32 dimensions in parquet beside loading everything + np.quantile.

Each run is a process of its own, in turns; both read the files, whose pages lie in the system's cache by then. The peer
computes the two quantiles only, ours the other four statistics and the fingerprint, too. Memory is the peak above the
process's size before the first read.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from prts_core.bench.peer import answer_of
from prts_core.bench.report import Row
from prts_core.contract import Contract, Dimension
from prts_core.data import statistics
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import data_file
from prts_core.data.lerobot_v21.writer import EpisodeToWrite, Layout, finish, record
from prts_core.data.normalize import ACTION, STATE

EPISODES, ROWS, WIDTH = 40, 125_000, 16  # state and action of WIDTH each
GOAL_MB = 300.0
_REPEATS = 3
_CHILD = "import sys; from pathlib import Path; from {0} import child; child(sys.argv[1], Path(sys.argv[2]))"


def rows(console: Console, episodes: int = EPISODES) -> list[Row]:
    what = f"statistics of {episodes * ROWS:,} rows x {2 * WIDTH} dimensions"
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"writing {episodes * ROWS:,} rows x {2 * WIDTH} dimensions ...")
        root = str(make(Path(folder), episodes))
        runs = [[answer_of(["-c", _CHILD.format(__name__), who, root]) for who in _SIDES] for _ in range(_REPEATS)]
    (ours, memory), (peer, loaded) = ((median(s), max(mb)) for s, mb in np.transpose(runs, (1, 2, 0)).tolist())
    whole = f"{what}, peak memory; peer: the goal (load everything: {loaded:.0f} MB)"
    what += ", reading included; peer: load everything, np.quantile"
    return [Row(what, ours, peer, "s", "lower", "<= 0.25"), Row(whole, memory, GOAL_MB, "MB", "lower", "< 1")]


def make(folder: Path, episodes: int) -> Path:
    """A dataset without cameras: normal numbers, in the files that pyarrow's defaults make."""
    dims = tuple(Dimension(f"joint_{index}") for index in range(WIDTH))
    feature = {"dtype": "float32", "shape": [WIDTH], "names": None}
    layout = Layout(folder / "data", {STATE: feature, ACTION: feature}, 30.0, "bench")
    edges = pa.array(np.arange(0, (ROWS + 1) * WIDTH, WIDTH, dtype=np.int32))
    records = []
    for index in range(episodes):
        rng = np.random.default_rng(index)
        columns: dict[str, Any] = {
            key: pa.ListArray.from_arrays(edges, pa.array(rng.standard_normal(ROWS * WIDTH, dtype=np.float32)))
            for key in (STATE, ACTION)
        }
        path = layout.root / data_file(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        episode = EpisodeToWrite(index, index * ROWS, "bench", "move", 0, columns, {})
        records.append(record(episode, {}))
    finish(layout, records, {"train": range(episodes)}, Contract("bench", 30.0, dims, dims, ()))
    return layout.root


def child(who: str, root: Path) -> None:
    """One run: prints seconds and MB."""
    before, begin = _memory("VmRSS"), time.perf_counter()
    _SIDES[who](root)
    print(json.dumps([time.perf_counter() - begin, _memory("VmHWM") - before]))


def _load_everything(root: Path) -> dict[str, np.ndarray]:
    dataset = LeRobotDataset.open(root)
    parts: dict[str, list[np.ndarray]] = {STATE: [], ACTION: []}
    for episode in dataset.episodes("train"):
        table = pq.read_table(root / dataset.info.data_file(episode), columns=list(parts))
        for key, arrays in parts.items():
            arrays.append(table[key].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1))
    del table
    pooled = {key: np.concatenate(parts.pop(key)) for key in (STATE, ACTION)}
    return {key: np.quantile(values, statistics.QUANTILES, axis=0) for key, values in pooled.items()}


_SIDES: dict[str, Callable[[Path], object]] = {"ours": statistics.compute, "peer": _load_everything}


def _memory(name: str) -> float:
    """A line of /proc/self/status in MB; getrusage would tell of the parent's peak, too."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024 / 1e6
