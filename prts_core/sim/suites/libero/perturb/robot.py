"""LIBERO-Plus, robot initial states: the arm begins with other joint angles.

Definition: LIBERO-Plus's joint angles (`_initstate_N`, N from 1 to 500): those of LIBERO plus 0.1 rad times ceil(N/100)
times the N-th direction drawn from numpy's old generator seeded with 42. What its released code does with them is less
than what its paper says: the stored initial state overwrites the joints again, and only the controller's rest posture
is kept. `applied: "posture"` is that, which published numbers measured; `applied: "joints"` also moves the arm. Ours:
level L is a start drawn from that of radius 0.1 L, with the joints moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.sim.suites.libero.perturb.draws import draw, integer, levelled, only

KINDS = ("joints",)
STARTS, PER_RADIUS, RADIUS = 500, 100, 0.1
APPLIED = ("joints", "posture")
REST = np.array([0.0, -1.61037389e-01, 0.0, -2.44459747, 0.0, 2.22675220, np.pi / 4])  # LIBERO's, rad


@dataclass(frozen=True)
class StartPose:
    """index: 1 to 500. joints: (7,) rad. moved: whether the arm itself is put there."""

    index: int
    joints: np.ndarray
    moved: bool


def start_of(settings: Mapping[str, Any], task: str) -> StartPose:
    """Of {index, applied} or {level, seed}. ConfigError for settings that are neither."""
    if "index" in settings:
        only("robot", settings, "index", "applied")
        index, applied = integer("robot", settings, "index", 1, STARTS), settings.get("applied", "joints")
        if applied not in APPLIED:
            raise ConfigError("robot: unknown", field="robot.applied", found=applied, expected=" or ".join(APPLIED))
        return StartPose(index, joints(index), applied == "joints")
    _, level, seed = levelled("robot", settings, KINDS)
    index = PER_RADIUS * (level - 1) + int(draw("robot", level, seed, task).integers(1, PER_RADIUS + 1))
    return StartPose(index, joints(index), True)


def joints(index: int) -> np.ndarray:
    """(7,) rad of start `index`."""
    direction = np.random.RandomState(42).randn(index, 7)[-1]
    return REST + RADIUS * -(-index // PER_RADIUS) * direction / np.linalg.norm(direction)


def begin(robot: Any, data: Any, start: StartPose) -> None:
    """Give robosuite's robot its start; the caller runs the simulator's forward pass."""
    if start.moved:
        data.qpos[robot._ref_joint_pos_indexes] = start.joints
        data.qvel[robot._ref_joint_vel_indexes] = 0.0
    robot.controller.initial_joint = start.joints.copy()
