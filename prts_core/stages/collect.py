"""Stage collect: scripted experts into raw HDF5; of a recording or dataset made elsewhere, the list of its files.

Files that are whole are kept across interruptions: each is written under a temporary name and renamed.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

from prts_core.config.load import present_root
from prts_core.config.schema import CollectConfig, MetaworldSource
from prts_core.data.convert.listed import list_files
from prts_core.files import list_tree, read_json, write_json
from prts_core.manifest import Manifest
from prts_core.progress import track
from prts_core.stages.base import StageContext, StageResult


def collect(config: CollectConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    source = config.source
    if not isinstance(source, MetaworldSource):
        files = list_files(present_root(config.dataset, source))
        write_json(context.output / "files.json", files)
        return StageResult({"files": len(files), "bytes": sum(f["size"] for f in files)}, artifacts=("files.json",))

    from prts_core.sim.demonstrations import record_task

    jobs = [
        (task, split, context.output / split / f"{task.name}_demo.hdf5")
        for split in ("train", "heldout")
        for task in source.tasks
    ]
    failures_path = context.work / "failures.json"
    failures = read_json(failures_path) if failures_path.exists() else {}
    todo = [job for job in jobs if not job[2].exists()]
    # Rendering contexts do not survive a fork, so workers start fresh.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=source.workers, mp_context=spawn) as pool:
        running = {pool.submit(record_task, source, task, split, path): (task, split) for task, split, path in todo}
        for done in track(as_completed(running), total=len(running), what="recording experts"):
            task, split = running[done]
            failures[f"{split}/{task.name}"] = done.result()
            write_json(failures_path, failures)
    write_json(context.output / "files.json", list_tree(context.output))
    count = {"train": source.train_episodes, "heldout": source.heldout_episodes}
    return StageResult(
        metrics={
            "tasks": len(source.tasks),
            "episodes": len(source.tasks) * sum(count.values()),
            "dropped_attempts": sum(failures.values()),
        },
        artifacts=("files.json",),  # lineage finds the raw files' digests in MLflow even when the files are gone
    )
