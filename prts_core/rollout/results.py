"""What a benchmark leaves behind: episodes.parquet, report.json, and videos of failures first.

It knows rows, plans and pictures; how they came about is the runner's, what they look like the page's.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import polars as pl

from prts_core.io.files import atomic_path, explain_os_errors
from prts_core.io.journal import Row
from prts_core.rollout.episode_plan import EpisodePlan
from prts_core.sim import protocol
from prts_core.sim.pool import WorkerLost
from prts_core.sim.suite import axis_of
from prts_core.statistics.binomial import Interval, wilson
from prts_core.statistics.sprt import Stop

if TYPE_CHECKING:
    from prts_core.rollout.local_policy import PolicyUnderTest
    from prts_core.sim.pool import Pool

T = TypeVar("T")
FILM_HZ = 10.0
FILM_STEPS = 60  # a message
LOST_AT_MOST = 3  # workers that one episode may cost when it is played again
SCHEMA: dict[str, Any] = {
    "condition": pl.String,
    "suite": pl.String,
    "task": pl.String,
    "instruction": pl.String,
    "initial_state": pl.Int64,
    "seed": pl.Int64,
    "success": pl.Boolean,
    "steps": pl.Int64,
    "looks": pl.Int64,
    "value_rows": pl.List(pl.Int64),
    "values": pl.List(pl.Float64),
    "perturbation": pl.String,
    "standins": pl.String,
}


def write_episodes(path: Path, plan: EpisodePlan, rows: Sequence[Row]) -> pl.DataFrame:
    """One row an episode, in the plan's order. `condition` is "policy", as in the chain's own benchmarks."""
    more = {"condition": "policy", "standins": plan.suite.standins}
    frame = pl.DataFrame([row | more for row in rows], schema=SCHEMA)
    with atomic_path(path) as unfinished:
        frame.write_parquet(unfinished)
    return frame


def timing(rows: Sequence[Row], events: Sequence[Row]) -> dict[str, Any]:
    """What depends on the machine and the hour: milliseconds a look (an expert does not look), workers lost.

    It lies beside a result, in timing.json, and never in it, so that equal work has equal bytes.
    """
    latencies = [row["latency_ms"] for row in rows if row["latency_ms"] is not None]
    told: dict[str, Any] = {"workers_lost": sum(event.get("kind") == "worker lost" for event in events)}
    if latencies:
        told["latency_ms"] = {
            "median": round(float(np.median(latencies)), 1),
            "p95": round(float(np.quantile(latencies, 0.95)), 1),
        }
    return told


def rounded(interval: Interval) -> list[float]:
    return [round(interval.lower, 4), round(interval.upper, 4)]


def summarize(plan: EpisodePlan, rows: Sequence[Row], policy: PolicyUnderTest, *, stop: Stop | None) -> dict[str, Any]:
    """The report: totals, tasks, protocol and labels."""
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    tasks = {}
    for task in plan.tasks:
        if own := by_task.get(task.name):
            steps = [row["steps"] for row in own if row["success"]]
            tasks[task.name] = {
                "instruction": own[0]["instruction"],
                **_score(own),
                "steps_of_successes": round(float(np.mean(steps)), 1) if steps else None,
                "max_steps": task.max_steps,
            }
    return {
        "suite": plan.suite.name,
        "labels": [label for label in (plan.suite.standins, policy.identity.get("unverified")) if label],
        "planned": len(plan.keys),
        **_score(rows),
        "mean_over_tasks": round(float(np.mean([task["success_rate"] for task in tasks.values()])), 4),
        "axes": by_axis(rows),
        "tasks": tasks,
        "policy": dict(policy.identity),
        "dtype": policy.identity.get("dtype", "fp32"),
        "policy_contract": policy.contract.fingerprint,
        "batch": policy.batch,
        "protocol": plan.protocol,
        "protocol_digest": plan.protocol_digest,
        "stopped_early": None if stop is None else asdict(stop),
    }


def _score(rows: Sequence[Row]) -> dict[str, Any]:
    won = sum(row["success"] for row in rows)
    return {
        "n": len(rows),
        "successes": won,
        "success_rate": round(won / len(rows), 4),
        "wilson95": rounded(wilson(won, len(rows))),
    }


def axis_of_row(row: Mapping[str, Any]) -> str:
    return axis_of(json.loads(row["perturbation"]))


def by_axis(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Rates along each axis of perturbation, and at each of its levels where it has any; {} where nothing is perturbed.

    Rows of unperturbed tasks, where there are some beside others, come under "none".
    """
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[axis_of_row(row)].append(row)
    if set(grouped) == {""}:
        return {}
    return {
        axis or "none": _score(grouped[axis]) | {"levels": _levels(axis, grouped[axis])} for axis in sorted(grouped)
    }


def _levels(axis: str, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    grouped: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        settings = json.loads(row["perturbation"]).get(axis)
        if isinstance(settings, dict) and isinstance(settings.get("level"), int):
            grouped[settings["level"]].append(row)
    return {str(level): _score(grouped[level]) for level in sorted(grouped)}


def choose_videos(plan: EpisodePlan, rows: Sequence[Row], limit: int) -> list[int]:
    """Indices of the episodes to show: failures, tasks in turn, then successes; at most `limit`."""
    failures = [index for index, row in enumerate(rows) if not row["success"]]
    successes = [index for index, row in enumerate(rows) if row["success"]]
    return [*failures, *successes][:limit]


def video_name(index: int, row: Row) -> str:
    verdict = "success" if row["success"] else "failure"
    return f"{verdict}_{index:05d}_{re.sub('[^A-Za-z0-9]+', '-', row['task'])[:60]}.mp4"


def render_video(pool: Pool, plan: EpisodePlan, index: int, row: Row, actions: np.ndarray, folder: Path) -> bool:
    """Play an episode's recorded actions again and write what a camera sees; False where it ended otherwise.

    An episode is not filmed while it runs: that renders every step, and nobody knows yet which ones fail.
    """
    from prts_core.config.schema import VideoConfig
    from prts_core.data.lerobot_v21.video import encode

    every = max(1, round(plan.suite.contract.control_hz / FILM_HZ))
    reply = pool.ask(0, protocol.reset(plan.keys[index], perturbation=plan.perturbation, observe=False, render=True))
    frames, success = [reply["frame"][None]], False
    for start in range(0, len(actions), FILM_STEPS):
        chunk = actions[start : start + FILM_STEPS]
        reply = pool.ask(0, protocol.step(chunk, observe=False, render=every))
        success = bool(reply["successes"].any())
        if reply["frames"] is not None:
            frames.append(reply["frames"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / video_name(index, row)
    with explain_os_errors(path):
        pictures = np.concatenate(frames)
        even = pictures[:, : pictures.shape[1] // 2 * 2, : pictures.shape[2] // 2 * 2]
        encode(path, even, plan.suite.contract.control_hz / every, VideoConfig(crf=26, gop=20, tune="none"))
    return success == row["success"]


def write_videos(pool: Pool, plan: EpisodePlan, rows: Sequence[Row], indices: Sequence[int], folder: Path) -> list[str]:
    """Videos of these episodes that are not there yet; what went wrong, in words."""
    faults = []
    for index in indices:
        row = rows[index]
        if (folder / "videos" / video_name(index, row)).exists():
            continue
        actions = np.load(folder / "actions" / f"{index:05d}.npy", allow_pickle=False)
        try:
            if not despite_losses(partial(render_video, pool, plan, index, row, actions, folder / "videos")):
                faults.append(f"{row['task']} {row['initial_state']}: played again it ended otherwise")
        except WorkerLost as err:
            faults.append(f"{row['task']} {row['initial_state']}: not filmed ({err.problem})")
    return faults


def despite_losses(play: Callable[[], T]) -> T:
    """What `play` returns, tried again where it costs a worker; WorkerLost where it costs LOST_AT_MOST."""
    for _ in range(LOST_AT_MOST - 1):
        with contextlib.suppress(WorkerLost):
            return play()
    return play()
