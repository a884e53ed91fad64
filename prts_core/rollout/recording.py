"""Rollouts kept whole: what was seen and done at every row, in raw HDF5 as demonstrations of the suite are recorded.

An episode is recorded by playing its actions again, as it is filmed: while it ran, nobody rendered what the policy did
not look at. `prts convert --source rollouts` makes a dataset of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prts_core.io.errors import require
from prts_core.io.files import atomic_path
from prts_core.io.journal import Row
from prts_core.io.progress import track
from prts_core.policy.observation import STATE
from prts_core.rollout.episode_plan import EpisodePlan
from prts_core.rollout.results import despite_losses
from prts_core.rollout.runner import KEY, row_key
from prts_core.sim import protocol
from prts_core.sim.expert_recorder import attributes_of, write_demo
from prts_core.sim.suite import Task

if TYPE_CHECKING:
    from prts_core.sim.pool import Pool


@dataclass(frozen=True)
class RecordedRun:
    """One condition of a benchmark, run. noise: what its actions were shaken with. folder: of its executed actions."""

    condition: str
    noise: float
    plan: EpisodePlan
    rows: Sequence[Row]
    folder: Path

    def of_task(self, task: str) -> list[tuple[Row, int]]:
        """(row, index in the plan)"""
        at = {row_key(key): index for index, key in enumerate(self.plan.keys)}
        return [(row, at[tuple(row[name] for name in KEY)]) for row in self.rows if row["task"] == task]


def write_rollouts(pool: Pool, runs: Sequence[RecordedRun], folder: Path) -> list[str]:
    """One file a task, those that are whole already left as they are; what could not be recorded, in words."""
    tasks = {task.name: task for run in runs for task in run.plan.tasks}
    faults: list[str] = []
    for task in track(list(tasks.values()), what="recording rollouts"):
        path = folder / f"{task.name}.hdf5"
        if not path.exists() and any(run.of_task(task.name) for run in runs):
            faults += _write_task(pool, runs, task, path)
    return faults


def _write_task(pool: Pool, runs: Sequence[RecordedRun], task: Task, path: Path) -> list[str]:
    h5py, faults, count = require("h5py", "sim"), [], 0
    spec = runs[0].plan.suite
    with atomic_path(path) as unfinished, h5py.File(unfinished, "w", track_order=True) as file:
        data = file.create_group("data", track_order=True)
        for run in runs:
            for row, index in run.of_task(task.name):
                actions = np.load(run.folder / f"{index:05d}.npy", allow_pickle=False)
                episode = despite_losses(partial(_episode, pool, run.plan, index, np.clip(actions, -1.0, 1.0)))
                if (episode["success_row"] is not None) != row["success"]:
                    faults.append(
                        f"{run.condition}, {task.name} {row['initial_state']}: played again it ended otherwise"
                    )
                    continue
                group = data.create_group(f"demo_{count}", track_order=True)
                _write_demo(group, run, episode, row)
                count += 1
        data.attrs.update(attributes_of(spec, task, spec.contract.cameras[0].height, task.instruction))
        data.attrs.update(num_demos=count, standins=spec.standins)
    return faults


def _write_demo(group: Any, run: RecordedRun, episode: dict[str, Any], row: Row) -> None:
    rewards = (np.arange(len(episode["actions"])) == episode["success_row"]).astype(np.float32)
    write_demo(group, run.plan.suite, episode, rewards)
    group.attrs["expert_noise"] = run.noise
    for name in ("seed", "initial_state", "instruction", "success"):
        group.attrs[name] = row[name]
    group.attrs["condition"] = run.condition
    if episode["success_row"] is not None:
        group.attrs["success_row"] = episode["success_row"]


def _episode(pool: Pool, plan: EpisodePlan, index: int, actions: np.ndarray) -> dict[str, Any]:
    """The episode's arrays, as sim/expert_episode.py has them."""
    reply = pool.ask(0, protocol.reset(plan.keys[index], perturbation=plan.perturbation))
    states, seen, success_row = [], [], None
    for row, action in enumerate(actions):
        seen.append(reply["observation"])
        states.append(pool.ask(0, protocol.state())["state"])
        reply = pool.ask(0, protocol.step(action[None], observe=row + 1 < len(actions)))
        if reply["successes"].any():
            success_row = row
            break
    done = actions[: len(seen)]
    return {
        "actions": done,
        "executed": done,
        "proprio": np.stack([one[STATE] for one in seen]),
        "states": np.stack(states),
        "images": {key: np.stack([one[key] for one in seen]) for key in seen[0] if key != STATE},
        "success_row": success_row,
    }
