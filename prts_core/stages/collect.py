"""Stage collect: scripted experts into raw HDF5; of a recording or dataset made elsewhere, the list of its files.

Files that are whole are kept across interruptions: each is written under a temporary name and renamed.
"""

from __future__ import annotations

import os
from concurrent.futures import as_completed
from pathlib import Path

from prts_core.config.schema import CollectConfig, ExpertSource, MetaworldSource
from prts_core.io.errors import require
from prts_core.io.files import write_json
from prts_core.io.progress import track
from prts_core.launch.orphans import fresh_workers
from prts_core.store.listing import list_files
from prts_core.store.manifest import Manifest
from prts_core.store.sources import listed_rows
from prts_core.store.stage import StageContext, StageResult


def collect(config: CollectConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    source = config.source
    if isinstance(source, MetaworldSource):
        metrics = _record_metaworld(source, context)
    elif isinstance(source, ExpertSource):
        metrics = _record_experts(source, context)
    else:
        files = listed_rows(config, context.outputs)
        write_json(context.output / "files.json", files)
        return StageResult({"files": len(files), "bytes": sum(f["size"] for f in files)}, artifacts=("files.json",))
    write_json(context.output / "files.json", [file.row for file in list_files(context.output)])
    # Lineage finds the raw files' digests in MLflow even when the files are gone.
    return StageResult(metrics=metrics, artifacts=("files.json",))


def _record_metaworld(source: MetaworldSource, context: StageContext) -> dict[str, float]:
    from prts_core.sim.demonstrations import record_task

    jobs = [
        (task, split, context.output / split / f"{task.name}_demo.hdf5")
        for split in ("train", "heldout")
        for task in source.tasks
    ]
    for left in context.output.rglob(".*.partial-*"):  # of a kill
        left.unlink()
    todo = [job for job in jobs if not job[2].exists()]
    with fresh_workers(source.workers) as pool:
        running = [pool.submit(record_task, source, *job) for job in todo]
        for done in track(as_completed(running), total=len(running), what="recording experts"):
            done.result()
    return {
        "tasks": len(source.tasks),
        "episodes": len(source.tasks) * (source.train_episodes + source.heldout_episodes),
        "dropped_attempts": sum(_dropped(path) for *_, path in jobs),
    }


def _dropped(path: Path) -> int:
    """Attempts that failed while this file was recorded, in whichever run that was."""
    with require("h5py", "sim").File(path) as file:
        return int(file["data"].attrs["failed_attempts"])


def _record_experts(source: ExpertSource, context: StageContext) -> dict[str, float]:
    """Through the suite's workers, resumable to the episode. The journal of attempts stays behind in the work folder:
    its order is that in which workers finished."""
    from prts_core.sim.demonstrate import demonstrate, recording
    from prts_core.sim.pool import launch_for
    from prts_core.sim.suites import suite

    spec = suite(source.suite)
    splits = {
        "train": (source.train_episodes, source.train_seed),
        "heldout": (source.heldout_episodes, source.heldout_seed),
    }
    metrics: dict[str, float] = {"tasks": 0, "episodes": 0, "dropped_attempts": 0}
    for split, (episodes, seed) in splits.items():
        settings, make = recording(
            spec,
            source.tasks,
            episodes,
            image_size=source.image_size,
            noise=source.noise,
            seed=seed,
            tail_steps=source.tail_steps,
        )
        made = context.work / "recorded" / split
        attempts = demonstrate(spec, settings, launch_for(source.suite, settings=make), made, source.workers)
        (context.output / split).mkdir(parents=True, exist_ok=True)
        for path in sorted(made.glob("*_demo.hdf5")):
            target = context.output / split / path.name
            if not target.exists():
                os.link(path, target)
        metrics["tasks"] = len(attempts)
        metrics["episodes"] += sum(each.successes for each in attempts)
        metrics["dropped_attempts"] += sum(each.failures for each in attempts)
    return metrics
