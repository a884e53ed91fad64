"""`prts bench data`, rows statistics: 5M rows x 32 dimensions in parquet beside load everything + np.quantile.

Each run is a process of its own, in turns; both read the files, whose pages lie in the system's cache by then. The peer
computes the two quantiles only, ours the other four statistics and the fingerprint, too. Memory is the peak above the
process's size before the first read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from prts_core.bench.report import Row
from prts_core.contract import Contract, Dimension
from prts_core.data import statistics
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import CHUNKS_SIZE, CODEBASE_VERSION, DATA_PATH
from prts_core.data.normalize import ACTION, STATE
from prts_core.io.files import write_json, write_jsonl

EPISODES, ROWS, WIDTH = 40, 125_000, 16  # state and action of WIDTH each
GOAL_MB = 300.0
_REPEATS = 3


def rows(console: Console, episodes: int = EPISODES) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"writing {episodes * ROWS:,} rows x {2 * WIDTH} dimensions ...")
        root = make(Path(folder), episodes)
        seen: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
        for _ in range(_REPEATS):
            for who, runs in seen.items():
                runs.append(_measure(who, root))
    ours, peer = (median(seconds for seconds, _ in seen[who]) for who in ("ours", "peer"))
    memory, loaded = (max(peak for _, peak in seen[who]) for who in ("ours", "peer"))
    what = f"statistics of {episodes * ROWS:,} rows x {2 * WIDTH} dimensions, reading included"
    return [
        Row(f"{what}; peer: load everything, np.quantile", ours, peer, "s", "lower", "<= 0.25"),
        Row(
            f"{what}, peak memory; peer: the goal (load everything: {loaded:.0f} MB)",
            memory,
            GOAL_MB,
            "MB",
            "lower",
            "< 1",
        ),
    ]


def make(folder: Path, episodes: int) -> Path:
    """A dataset without cameras: normal numbers, in the files that the writer's defaults make."""
    root = folder / "data"
    dims = tuple(Dimension(f"joint_{index}") for index in range(WIDTH))
    Contract("bench", 30.0, dims, dims, ()).save(root / "meta" / "contract.json")
    feature = {"dtype": "float32", "shape": [WIDTH], "names": None}
    info = {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": "bench",
        "total_episodes": episodes,
        "total_frames": episodes * ROWS,
        "total_tasks": 1,
        "chunks_size": CHUNKS_SIZE,
        "fps": 30,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "features": {STATE: feature, ACTION: feature},
    }
    write_json(root / "meta" / "info.json", info)
    lines = [{"episode_index": index, "tasks": ["move"], "length": ROWS} for index in range(episodes)]
    write_jsonl(root / "meta" / "episodes.jsonl", lines)
    write_jsonl(root / "meta" / "tasks.jsonl", [{"task_index": 0, "task": "move"}])
    edges = pa.array(np.arange(0, (ROWS + 1) * WIDTH, WIDTH, dtype=np.int32))
    for index in range(episodes):
        rng = np.random.default_rng(index)
        columns = {}
        for key in (STATE, ACTION):
            numbers = pa.array(rng.standard_normal(ROWS * WIDTH, dtype=np.float32))
            columns[key] = pa.ListArray.from_arrays(edges, numbers)
        path = root / DATA_PATH.format(episode_chunk=index // CHUNKS_SIZE, episode_index=index)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    return root


def child(who: str, root: Path) -> None:
    """One run: prints seconds and MB."""
    work: Callable[[Path], object] = statistics.compute if who == "ours" else _load_everything
    before = _memory("VmRSS")
    begin = time.perf_counter()
    work(root)
    print(json.dumps([time.perf_counter() - begin, (_memory("VmHWM") - before)]))


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


def _measure(who: str, root: Path) -> tuple[float, float]:
    code = "import sys; from pathlib import Path; from prts_core.bench.data_statistics import child; "
    command = [sys.executable, "-c", code + "child(sys.argv[1], Path(sys.argv[2]))", who, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def _memory(name: str) -> float:
    """A line of /proc/self/status in MB; getrusage would tell of the parent's peak, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {name}")
