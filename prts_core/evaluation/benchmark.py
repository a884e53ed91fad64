"""The demo's benchmark: a policy and its controls on held-out seeds of every task, resumable by task and condition.

Conditions: policy, untrained (same network, random weights), blind_replay (mean training trajectory), swapped (the
pair's
sentences exchanged), black_images, expert; then early and noisy, which only make failures for the value's AUROC.
It does not know stages; `benchmark_policy` takes folders and returns the report.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prts_core.config.schema import BenchmarkConfig, MetaworldSource, TaskSpec
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.errors import ConfigError
from prts_core.evaluation.intervals import wilson
from prts_core.files import explain_os_errors, read_json, write_json
from prts_core.policy import policy_digest
from prts_core.progress import track

CONTROLS = ("policy", "expert", "blind_replay", "untrained", "black_images", "swapped")
CONDITIONS = (*CONTROLS, "early", "noisy")
ENVIRONMENTS = 10  # at once, a task


@dataclass(frozen=True)
class Places:
    """Folders of one benchmark. early: an earlier checkpoint of the same training, or none. work: resume state."""

    policy: Path
    dataset: Path | None
    early: Path | None
    work: Path
    output: Path


def mean_trajectory(dataset: LeRobotDataset, instruction: str) -> np.ndarray:
    """(T, A) mean over the training episodes of a task that are still running at each row: what blind replay plays."""
    episodes = [dataset.actions(e) for e in dataset.episodes("train") if dataset.instruction(e) == instruction]
    longest = max(len(a) for a in episodes)
    return np.stack([np.mean([a[row] for a in episodes if len(a) > row], axis=0) for row in range(longest)])


def benchmark_policy(config: BenchmarkConfig, places: Places, conditions: tuple[str, ...] = CONTROLS) -> dict[str, Any]:
    """Run what is not yet in `places.work`, write episodes.parquet, videos and report.json to `places.output`."""
    source = config.source
    if not isinstance(source, MetaworldSource):
        raise ConfigError(
            "Only Meta-World datasets can be benchmarked here", field="deploy", found=config.dataset,
            expected="a dataset whose source.kind is metaworld",
        )  # fmt: skip
    unknown = set(config.record) - {*CONDITIONS}
    if unknown:
        raise ConfigError(
            "A condition that the benchmark does not have is to be recorded", field="benchmark.record",
            found=min(unknown), expected=", ".join(CONDITIONS),
        )  # fmt: skip
    replays = {}
    if places.dataset is not None and "blind_replay" in conditions:
        dataset = LeRobotDataset.open(places.dataset)
        replays = {task.name: mean_trajectory(dataset, task.instruction) for task in source.tasks}
    places.work.mkdir(parents=True, exist_ok=True)
    todo = [task for task in source.tasks if not (places.work / f"{task.name}.json").exists()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(config.workers, max(1, len(todo))), mp_context=spawn) as pool:
        running = [
            pool.submit(run_task, config, source, task, places, conditions, replays.get(task.name)) for task in todo
        ]
        for done in track(as_completed(running), total=len(running), what="benchmark"):
            done.result()
    rows = [row for task in source.tasks for row in read_json(places.work / f"{task.name}.json")]
    places.output.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(rows, infer_schema_length=None)
    frame.write_parquet(places.output / "episodes.parquet")
    report = summarize(frame, source.tasks) | {"policy_digest": policy_digest(places.policy)}
    write_json(places.output / "report.json", report)
    return report


def run_task(
    config: BenchmarkConfig, source: MetaworldSource, task: TaskSpec, places: Places, conditions: tuple[str, ...],
    replay: np.ndarray | None,
) -> None:  # fmt: skip
    """All episodes of one task in one process, written to work/<task>.json when all are done."""
    import torch

    from prts_core.evaluation.recording import write_rollouts
    from prts_core.evaluation.rollout import Arena, Job, Outcome
    from prts_core.policy import load_policy, untrained_policy

    torch.set_num_threads(1)  # one core a worker
    arena = Arena(task.name, min(config.episodes, ENVIRONMENTS), source)
    policy = load_policy(places.policy)
    seeds = [config.seed + i for i in range(config.episodes)]
    base = [Job("policy", task.name, task.instruction, seed, task.max_steps) for seed in seeds]

    def run(condition: str, actor: Any, **changes: Any) -> list[Outcome]:
        jobs = [replace(job, condition=condition, record=condition in config.record, **changes) for job in base]
        return arena.run(jobs, execute=config.execute_steps, policy=actor, replay=replay)

    outcomes: list[Outcome] = []
    for condition in conditions:
        if condition == "policy":
            kept = condition in config.record
            jobs = [
                replace(job, score_value=True, film=i < config.videos_per_task, record=kept)
                for i, job in enumerate(base)
            ]
            outcomes += arena.run(jobs, execute=config.execute_steps, policy=policy)
        elif condition == "expert":
            outcomes += run(condition, None, controller="expert")
        elif condition == "blind_replay":
            outcomes += run(condition, None, controller="replay")
        elif condition == "untrained":
            outcomes += run(condition, untrained_policy(places.policy, config.seed))
        elif condition == "black_images":
            outcomes += run(condition, policy, black=True)
        elif condition == "swapped" and task.name in config.swap_pair:
            other = config.swap_pair[1 - config.swap_pair.index(task.name)]
            sentence = next((t.instruction for t in source.tasks if t.name == other), None)
            if sentence is None:
                raise ConfigError("swap_pair names a task the dataset lacks", field="benchmark.swap_pair", found=other)
            outcomes += run(condition, policy, instruction=sentence)
    if "policy" in conditions and config.failures_wanted:
        share = -(-config.failures_wanted // len(source.tasks)) + 1
        sources: list[tuple[str, Any, float]] = []
        if places.early is not None:
            sources.append(("early", load_policy(places.early), 0.0))
        sources += [("noisy", policy, level) for level in config.action_noise]
        for condition, actor, level in sources:
            failed = sum(not o.success for o in outcomes if o.job.score_value)
            if failed >= share:
                break
            # Values are the evaluated policy's own, whoever acts.
            outcomes += run(condition, _ActsLike(actor, policy), noise=level, score_value=True)
    film(outcomes, places.output / "videos", source)
    if config.record:
        write_rollouts(places.output / "rollouts" / f"{task.name}.hdf5", task, source, outcomes)
    write_json(places.work / f"{task.name}.json", [_row(outcome) for outcome in outcomes])


class _ActsLike:
    """One policy's actions with another policy's value of them."""

    def __init__(self, actor: Any, judge: Any) -> None:
        self.act, self.value = actor.act, judge.value


def _row(outcome: Any) -> dict[str, Any]:
    job = asdict(outcome.job)
    return {
        **{k: job[k] for k in ("condition", "task", "instruction", "seed", "max_steps", "noise")},
        "success": outcome.success,
        "steps": outcome.steps,
        "latency_ms": round(outcome.latency_ms, 1),
        "value_rows": [row for row, _ in outcome.values],
        "values": [value for _, value in outcome.values],
    }


def film(outcomes: list[Any], folder: Path, source: MetaworldSource) -> None:
    """Write the filmed rollouts, named by task, seed and what became of them."""
    from prts_core.config.schema import VideoConfig
    from prts_core.data.lerobot_v21.video import encode
    from prts_core.sim.metaworld import SIMULATOR_HZ

    for outcome in outcomes:
        if outcome.frames:
            folder.mkdir(parents=True, exist_ok=True)
            verdict = "success" if outcome.success else "failure"
            path = folder / f"{outcome.job.task}_{outcome.job.seed}_{verdict}.mp4"
            with explain_os_errors(path):
                encode(
                    path, np.stack(outcome.frames), SIMULATOR_HZ / source.action_repeat / 2, VideoConfig(crf=23, gop=10)
                )


def summarize(frame: pl.DataFrame, tasks: tuple[TaskSpec, ...]) -> dict[str, Any]:
    """Means over tasks of every condition, and the table of tasks with Wilson intervals."""

    def rate(condition: str, task: str) -> float | None:
        rows = frame.filter((pl.col("condition") == condition) & (pl.col("task") == task))
        return None if rows.is_empty() else float(rows["success"].mean())  # type: ignore[arg-type]

    def mean(condition: str) -> float | None:
        rates = [r for task in tasks if (r := rate(condition, task.name)) is not None]
        return round(float(np.mean(rates)), 4) if rates else None

    table = {}
    for task in tasks:
        rows = frame.filter((pl.col("condition") == "policy") & (pl.col("task") == task.name))
        n, successes = len(rows), int(rows["success"].sum())
        interval = wilson(successes, n)
        table[task.name] = {
            "instruction": task.instruction,
            "n": n,
            "successes": successes,
            "wilson95": [round(interval.lower, 4), round(interval.upper, 4)],
            "expert": rate("expert", task.name),
            "blind_replay": rate("blind_replay", task.name),
            "max_steps": task.max_steps,
        }
    names = {
        "success_rate": "policy",
        "untrained_success_rate": "untrained",
        "blind_replay_success_rate": "blind_replay",
        "swapped_success_rate": "swapped",
        "black_image_success_rate": "black_images",
    }
    return {key: mean(condition) for key, condition in names.items()} | {"tasks": table}
