"""Scripted experts recorded into raw HDF5 in the robomimic / LIBERO layout, one file a task and split.

An episode is the pure function of (task, seed, settings): the noise that pushes the expert off its path is drawn from
the episode's own seed, and failed attempts are dropped, never repaired.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.schema import MetaworldSource, TaskSpec
from prts_core.io.errors import DataError, require
from prts_core.io.files import atomic_path
from prts_core.sim.metaworld import CAMERAS, MetaworldEnv, ScriptedExpert

NOISE_ROWS = 2  # a push is held, else the hand's inertia swallows it


@dataclass
class Demonstration:
    """One episode of T rows; row t holds what was seen before action t."""

    seed: int
    noise: float
    success_row: int
    actions: np.ndarray  # (T, 4) clean expert labels
    executed: np.ndarray  # (T, 4) what the simulator got
    proprio: np.ndarray  # (T, 4)
    states: np.ndarray  # (T, nq + nv)
    images: dict[str, np.ndarray]  # camera -> (T, H, W, 3) uint8
    subtasks: list[dict[str, Any]]  # [{start_frame, end_frame, action_text}]


def record_episode(
    env: MetaworldEnv, expert: ScriptedExpert, seed: int, noise: float, max_rows: int, tail_rows: int
) -> Demonstration | None:
    """One attempt; None when the task's success flag was not raised within `max_rows` rows."""
    rng = np.random.default_rng(seed)
    env.reset(seed)
    actions, executed, proprio, states, phases = [], [], [], [], []
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in CAMERAS}
    success_row, phase = None, 0
    for row in range(max_rows + tail_rows):
        if row >= max_rows and success_row is None:
            return None
        phase = max(phase, expert.phases.at(env.privileged()))
        action = expert.act(env)
        if row % NOISE_ROWS == 0:
            push = np.r_[rng.normal(0.0, noise, 3), 0.0].astype(np.float32)
        shaken = action + push
        actions.append(action)
        executed.append(np.clip(shaken, -1.0, 1.0).astype(np.float32))
        proprio.append(env.proprioception())
        states.append(env.simulator_state())
        phases.append(phase)
        for camera, picture in env.images().items():
            images[camera].append(picture)
        if env.step(executed[-1]) and success_row is None:
            success_row = row
        if success_row is not None and row >= success_row + tail_rows:
            break
    if success_row is None:
        return None
    return Demonstration(
        seed,
        noise,
        success_row,
        np.stack(actions),
        np.stack(executed),
        np.stack(proprio),
        np.stack(states),
        {camera: np.stack(pictures) for camera, pictures in images.items()},
        subtask_spans(phases, expert.phases.sentences),
    )


def subtask_spans(phases: list[int], sentences: tuple[str, ...]) -> list[dict[str, Any]]:
    """Runs of equal phase as the public `action_config` form; `end_frame` is exclusive."""
    spans: list[dict[str, Any]] = []
    for row, phase in enumerate(phases):
        if spans and spans[-1]["action_text"] == sentences[phase]:
            spans[-1]["end_frame"] = row + 1
        else:
            spans.append({"start_frame": row, "end_frame": row + 1, "action_text": sentences[phase]})
    return spans


def record_task(source: MetaworldSource, task: TaskSpec, split: str, path: Path) -> int:
    """Record one task's episodes of one split into `path`; returns how many attempts failed and were dropped.

    Raises DataError when more than half of the attempts fail: then the noise is too high for this expert.
    """
    h5py = require("h5py", "sim")
    wanted, first_seed = (
        (source.train_episodes, source.train_seed)
        if split == "train"
        else (source.heldout_episodes, source.heldout_seed)
    )
    env = MetaworldEnv.of(task.name, source)
    expert = ScriptedExpert(task.name)
    max_rows = -(-2 * task.max_steps // source.action_repeat)
    failed = kept = 0
    with atomic_path(path) as partial, h5py.File(partial, "w", track_order=True) as file:
        data = file.create_group("data", track_order=True)
        total = attempt = 0
        while kept < wanted:
            noise = task.expert_noise[attempt % len(task.expert_noise)] if split == "train" else 0.0
            episode = record_episode(env, expert, first_seed + attempt, noise, max_rows, source.tail_rows)
            attempt += 1
            if episode is None:
                failed += 1
                if failed > wanted + 20:
                    raise DataError(
                        "The scripted expert fails too often to record demonstrations",
                        field=f"tasks.{task.name}.expert_noise",
                        found=f"{failed} failures in {attempt} attempts",
                        cure="lower expert_noise for this task, or raise its max_steps",
                    )
                continue
            write_demo(data.create_group(f"demo_{kept}", track_order=True), episode)
            kept, total = kept + 1, total + len(episode.actions)
        data.attrs["env_args"] = json.dumps(
            {
                "env_name": f"{task.name}-v3",
                "env_type": "metaworld",
                "action_repeat": source.action_repeat,
                "start_jitter": source.start_jitter,
                "image_size": source.image_size,
                "max_steps": task.max_steps,
            },
            sort_keys=True,
        )
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.instruction})
        data.attrs["num_demos"], data.attrs["total"], data.attrs["failed_attempts"] = kept, total, failed
    return failed


def write_demo(group: Any, episode: Demonstration) -> None:
    """One episode's arrays and attributes in the robomimic layout."""
    rows = len(episode.actions)
    flags = np.arange(rows) == episode.success_row
    for name, value in {
        "actions": episode.actions,
        "executed_actions": episode.executed,
        "rewards": flags.astype(np.float32),
        "dones": (np.arange(rows) == rows - 1).astype(np.uint8),
        "states": episode.states,
        "obs/proprio": episode.proprio,
        **{f"obs/{camera}_rgb": pictures for camera, pictures in episode.images.items()},
    }.items():
        write_array(group, name, value)
    group.attrs["num_samples"], group.attrs["seed"] = rows, episode.seed
    group.attrs["expert_noise"] = episode.noise
    group.attrs["success_row"] = episode.success_row
    if episode.subtasks:
        group.attrs["action_config"] = json.dumps(episode.subtasks)


def write_array(group: Any, name: str, value: np.ndarray) -> None:
    """Pictures are packed one by one. Level 1 takes them to a quarter; higher levels cost time and gain little."""
    packed = {"compression": "gzip", "compression_opts": 1, "chunks": (1, *value.shape[1:])}
    group.create_dataset(name, data=value, track_times=False, **(packed if value.ndim == 4 else {}))
