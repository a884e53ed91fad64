"""Time how training starts on a million episodes of 200 rows each, and weigh the index that it starts from.

The dataset is metadata and an index: no table and no video is there, and none is opened. A process of its own starts:
it imports, maps the index, says which rows are samples and draws the first batches.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from prts_core.bench.peer import answer_of
from prts_core.bench.report import Row
from prts_core.contract import Camera, Contract, Dimension
from prts_core.data.index import INDEX, NOT_RECORDED, SPAN, STRETCH, DatasetIndex, described
from prts_core.data.lerobot_v21.schema import (
    ACTION,
    CODEBASE_VERSION,
    DATA_PATH,
    STANDARD_FEATURES,
    STATE,
    VIDEO_PATH,
    totals,
)
from prts_core.io.files import write_json, write_jsonl

EPISODES, LENGTH, TASKS, TEXTS, DIMS, CAMERA = 1_000_000, 200, 50_000, 5_000, 14, "observation.images.front"


def rows(console: Console) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        index = write(Path(folder), EPISODES)
        begin = time.perf_counter()
        found = answer_of(["-m", __name__, folder])
        seconds = time.perf_counter() - begin
    size = f"{EPISODES // 10**6}M episodes, {EPISODES * LENGTH // 10**6}M rows"
    return [
        Row(
            f"memory a row of the index, {size} / 1 byte", index.bytes / (EPISODES * LENGTH), 1.0, "B", "lower", "<= 16"
        ),
        Row(f"start of training on {size} / 1 second", seconds, 1.0, "s", "lower", "<= 20"),
        Row(f"memory of training's start on {size} / 1 GB", found["bytes"] / 1e9, 1.0, "GB", "lower", "<= 2"),
    ]


def write(root: Path, episodes: int, tasks: int = TASKS, texts: int = TEXTS) -> DatasetIndex:
    """The metadata of a dataset with three subtasks an episode, and its index below it."""
    rng = np.random.default_rng(0)
    dims = tuple(Dimension(f"joint_{i}", "rad") for i in range(DIMS))
    vector = {"dtype": "float32", "shape": [DIMS], "names": [d.name for d in dims]}
    picture = {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]}
    named = {index: f"put object {index} into its place" for index in range(tasks)}
    held = episodes // 100
    about = {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": "bench",
        "fps": 30,
        "chunks_size": 1000,
        "splits": {"train": f"0:{episodes - held}", "heldout": f"{episodes - held}:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": {STATE: vector, ACTION: vector, CAMERA: picture, **STANDARD_FEATURES},
    }
    write_json(root / "meta" / "info.json", about | totals([LENGTH] * episodes, tasks, 1))
    write_jsonl(root / "meta" / "tasks.jsonl", [{"task_index": i, "task": task} for i, task in named.items()])
    Contract("bench", 30, dims, dims, (Camera(CAMERA, "Camera front", 480, 640),)).save(root / "meta" / "contract.json")
    stretches = np.zeros(episodes, STRETCH)
    stretches["end"], stretches["goal"], stretches["success"] = LENGTH, LENGTH - 1, NOT_RECORDED
    stretches["task"] = rng.integers(0, tasks, episodes)
    spans = np.zeros(3 * episodes, SPAN)
    spans["end"] = np.tile([60, 130, LENGTH], episodes)
    spans["text"] = rng.integers(0, texts, len(spans))
    told = [f"move to object {index}" for index in range(texts)]
    first = np.arange(episodes + 1, dtype=np.int64)
    index = DatasetIndex(stretches, first, spans, 3 * first, named, told, described(root))
    index.save(root / INDEX)
    return index


def start(root: Path, folder: Path) -> Any:
    """What a stage does before its first step, without the network; returns the batches' source."""
    from prts_core.bench.data_loading import make_processor
    from prts_core.data.index import open_indexed
    from prts_core.training.batch import BatchSource
    from prts_core.training.datasets import RobotDataset, held_out_set
    from prts_core.training.shared_files import SharedFiles

    dataset, index = open_indexed(root, root)
    states, actions = np.random.default_rng(0).normal(size=(2, 100, DIMS))
    processor = make_processor(dataset, states, actions, folder)
    options: Any = {"train_subtask": "mixture:0.5", "shared": SharedFiles(left=0)}
    held_out = held_out_set("bench", dataset, index, processor, **options)
    sets = [RobotDataset("bench", dataset, index, processor, dataset.episodes("train"), **options)]
    assert len(held_out) == 1 and len(sets[0].tasks) > 1
    model = processor.model
    return BatchSource(
        sets,
        [1.0],
        256,
        0,
        chunk_length=model.chunk_length,
        max_action_dim=model.max_action_dim,
        patch=model.vision.patch_size,
        merge=model.vision.merge_size,
        response=True,
        contrastive=1,
    )


def main() -> None:
    import json

    with tempfile.TemporaryDirectory() as folder:
        source = start(Path(sys.argv[1]), Path(folder))
    plans = source.plans(source.start())
    for _ in range(10):
        for row in next(plans).rows:
            source.sources[0].places(np.array([draw.row for draw in row]))
    print(json.dumps({"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
