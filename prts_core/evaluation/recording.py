"""Rollouts kept whole: what was seen and done at every row, in raw HDF5 as demonstrations are recorded.

It does not know policies or datasets; `prts convert --source rollouts` makes a dataset of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.schema import MetaworldSource, TaskSpec
from prts_core.errors import require
from prts_core.files import atomic_path
from prts_core.sim.demonstrations import Episode, write_demo
from prts_core.sim.metaworld import SIMULATOR_HZ, MetaworldEnv


@dataclass
class Tape:
    """One rollout while it happens; row t holds what was seen before action t."""

    actions: list[np.ndarray] = field(default_factory=list)  # (4,) as executed, noise and all
    proprio: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    images: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, env: MetaworldEnv, action: np.ndarray) -> None:
        self.actions.append(np.clip(action, -1.0, 1.0).astype(np.float32))
        self.proprio.append(env.proprioception())
        self.states.append(env.simulator_state())
        for camera, picture in env.images().items():
            self.images.setdefault(camera, []).append(picture)

    def episode(self, seed: int, noise: float, success: bool) -> Episode:
        actions = np.stack(self.actions)
        return Episode(
            seed=seed,
            noise=noise,
            success_row=len(actions) - 1 if success else None,  # a rollout ends with the row that succeeds
            actions=actions,
            executed=actions,
            proprio=np.stack(self.proprio),
            states=np.stack(self.states),
            images={camera: np.stack(pictures) for camera, pictures in self.images.items()},
            subtasks=[],
        )


def write_rollouts(path: Path, task: TaskSpec, source: MetaworldSource, outcomes: Sequence[Any]) -> int:
    """Write the recorded ones of `outcomes` (prts_core.evaluation.rollout.Outcome) of one task; returns how many."""
    h5py = require("h5py", "sim")
    taped = [outcome for outcome in outcomes if outcome.tape is not None and outcome.tape.actions]
    with atomic_path(path) as partial, h5py.File(partial, "w", track_order=True) as file:
        data = file.create_group("data", track_order=True)
        for number, outcome in enumerate(taped):
            job = outcome.job
            group = data.create_group(f"demo_{number}", track_order=True)
            write_demo(group, outcome.tape.episode(job.seed, job.noise, outcome.success))
            group.attrs["condition"], group.attrs["success"] = job.condition, outcome.success
            group.attrs["instruction"] = job.instruction
        environment = {
            "env_name": f"{task.name}-v3",
            "env_type": "metaworld",
            "action_repeat": source.action_repeat,
            "control_hz": SIMULATOR_HZ / source.action_repeat,
        }
        data.attrs["env_args"] = json.dumps(environment, sort_keys=True)
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.instruction})
    return len(taped)
