"""How LIBERO's scripted expert moves: OSC_POSE actions towards a pose of the hand, and what a skill is.

World frame, metres, radians.
"""

from __future__ import annotations

import numpy as np

from prts_core.sim.suites.libero.expert_scene import ExpertScene

STEP_M, STEP_RAD = 0.05, 0.5  # of one unit of an OSC_POSE action
OPEN, CLOSE = -1.0, 1.0
GAIN = 2.0
UP = np.array([0.0, 0.0, 0.05])


def action(scene: ExpertScene, target: np.ndarray, yaw: float, gripper: float, speed: float = 1.0) -> np.ndarray:
    """(7,) float32 towards a position (3,) and a yaw of the fingers' opening, the hand pointing down."""
    move = GAIN * (target - scene.hand) / STEP_M
    move[:2] *= speed / max(np.abs(move[:2]).max(), speed)
    move[2] = np.clip(move[2], -speed, speed)
    tilt = np.cross(scene.approach, [0.0, 0.0, -1.0])
    turn = np.r_[tilt[:2], (yaw - scene.yaw + np.pi) % (2 * np.pi) - np.pi]
    return np.r_[move, np.clip(GAIN * turn / STEP_RAD, -0.5, 0.5), gripper].astype(np.float32)


def aim(
    scene: ExpertScene,
    target: np.ndarray,
    approach: np.ndarray,
    opening: np.ndarray,
    gripper: float,
    speed: float = 1.0,
) -> np.ndarray:
    """(7,) float32 towards a position (3,) with the hand pointing along `approach` (3,) and its fingers opening along
    `opening` (3,), finger 1 to finger 2; both of length 1, one across the other."""
    move = GAIN * (target - scene.hand) / STEP_M
    move *= speed / max(np.abs(move).max(), speed)
    turn = scene.turn_to(approach, opening)
    return np.r_[move, np.clip(GAIN * turn / STEP_RAD, -0.5, 0.5), gripper].astype(np.float32)


def travel(
    scene: ExpertScene,
    target: np.ndarray,
    approach: np.ndarray,
    opening: np.ndarray,
    gripper: float,
    clear: float = 0.08,
) -> np.ndarray:
    """`aim` by way of the air: up, across above whatever stands on the way, down. `clear`: how far below the grip site
    the hand reaches while it turns."""
    aside = float(np.linalg.norm(scene.hand[:2] - target[:2]))
    turned = float(np.linalg.norm(scene.turn_to(approach, opening))) < 0.35
    if aside < 0.04 and turned:
        return aim(scene, target, approach, opening, gripper)
    fly = max(target[2] + 0.03, scene.top_along(scene.hand, target, 0.08, "") + clear)
    if scene.hand[2] < fly - 0.03 and aside > 0.04:
        return aim(scene, np.r_[scene.hand[:2] + 0.15 * (target - scene.hand)[:2], fly], approach, opening, gripper)
    return aim(scene, np.r_[target[:2], max(fly, scene.hand[2] - 0.02)], approach, opening, gripper)


class Skill:
    """One goal of a task. `done`: holds in the scene; `act`: (7,) float32 and sets `phase`."""

    phase = ""

    @property
    def busy(self) -> bool:
        """A thing is in the hand: no other skill may begin."""
        return False

    def done(self, scene: ExpertScene) -> bool:
        raise NotImplementedError

    def act(self, scene: ExpertScene) -> np.ndarray:
        raise NotImplementedError
