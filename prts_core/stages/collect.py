"""Stage collect: scripted experts into raw HDF5; of a recording or dataset made elsewhere, the list of its files."""

from __future__ import annotations

import os
from dataclasses import replace

from prts_core.config.schema import CollectConfig
from prts_core.config.sources import ExpertSource
from prts_core.io.files import write_json
from prts_core.store.listing import list_files
from prts_core.store.manifest import Manifest
from prts_core.store.sources import listed_rows
from prts_core.store.stage import StageContext, StageResult


def collect(config: CollectConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    source = config.source
    if isinstance(source, ExpertSource):
        metrics = _record(source, context)
        write_json(context.output / "files.json", [file.row for file in list_files(context.output)])
        # Lineage finds the raw files' digests in MLflow even when the files are gone.
        return StageResult(metrics=metrics, artifacts=("files.json",))
    files = listed_rows(config, context.outputs)
    write_json(context.output / "files.json", files)
    return StageResult({"files": len(files), "bytes": sum(f["size"] for f in files)}, artifacts=("files.json",))


def _record(source: ExpertSource, context: StageContext) -> dict[str, float]:
    """Through the suite's workers, resumable to the episode. The journal of attempts stays behind in the work folder:
    its order is that in which workers finished."""
    from prts_core.sim.expert_recorder import demonstrate, recording
    from prts_core.sim.pool import Pool, launch_for
    from prts_core.sim.suites import suite

    spec = suite(source.suite, source.settings)
    train = recording(
        spec,
        source.tasks,
        source.train_episodes,
        image_size=source.image_size,
        settings=source.settings,
        noise=source.noise,
        task_noise=source.task_noise,
        seed=source.train_seed,
        tail_steps=source.tail_steps,
    )
    # Held-out demonstrations are what the expert does when nothing disturbs it.
    heldout = replace(train, episodes=source.heldout_episodes, seed=source.heldout_seed, noise=(0.0,), task_noise={})
    metrics: dict[str, float] = {"tasks": 0, "episodes": 0, "dropped_attempts": 0}
    with Pool(launch_for(source.suite, settings=train.worker_settings), source.workers) as pool:
        for split, settings in (("train", train), ("heldout", heldout)):
            if not settings.episodes:
                continue
            made = context.work / "recorded" / split
            attempts = demonstrate(spec, settings, pool, made)
            (context.output / split).mkdir(parents=True, exist_ok=True)
            for path in sorted(made.glob("*_demo.hdf5")):
                target = context.output / split / path.name
                if not target.exists():
                    os.link(path, target)
            metrics["tasks"] = len(attempts)
            metrics["episodes"] += sum(each.successes for each in attempts)
            metrics["dropped_attempts"] += sum(each.failures for each in attempts)
    return metrics
