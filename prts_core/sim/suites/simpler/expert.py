"""SimplerEnv's scripted expert: carry one thing to a place, from privileged poses, in the words of the Bridge data.

A phase follows from what is seen, so that a drop or a push sends it back to the phase that mends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prts_core.io.errors import SimulatorError
from prts_core.sim.suite import Environment, SuiteSpec, Task
from prts_core.sim.suites.simpler.environment import POINTING_DOWN, matrix_of, rpy_of
from prts_core.sim.suites.simpler.spec import TASKS

UP = np.array([0.0, 0.0, 1.0])
OPEN, CLOSE = 1.0, 0.0
STEP_M, STEP_RAD = 0.04, 0.3  # of one action at most
ABOVE = 0.08  # m over the place of a grasp
CLOSING, OPENING = 3, 3  # steps that the gripper takes


@dataclass(frozen=True)
class Grip:
    """How a thing is held: `along` its x axis and `rise` over its middle the fingers meet, across its y axis. Put down
    when its middle is `over` the target's. words: the thing and where it goes."""

    along: float
    rise: float
    over: float
    words: tuple[str, str]


GRIPS = {
    "widowx_spoon_on_towel": Grip(0.0, 0.0, 0.02, ("spoon", "onto the towel")),
    "widowx_carrot_on_plate": Grip(0.0, 0.0, 0.03, ("carrot", "onto the plate")),
    "widowx_stack_cube": Grip(0.0, 0.0, 0.033, ("green block", "onto the yellow block")),
}


class SimplerExpert:
    """See prts_core.sim.suite.Expert."""

    noise_weights = (0.02, 0.02, 0.02, 0.05, 0.05, 0.05, 0.0)

    def __init__(self, grip: Grip) -> None:
        self.grip, self.phase = grip, ""
        self.closed = self.opened = 0  # steps
        self.held: np.ndarray | None = None  # (3,) the thing's middle from the hand, when it was closed on

    def act(self, environment: Environment) -> np.ndarray:
        seen = environment.privileged()
        thing, place, hand = seen["carried"][0], seen["target"][0], seen["hand"][0]
        if self.held is not None and np.linalg.norm(thing - hand - self.held) > 0.04:
            self.held, self.closed = None, 0  # it slipped, or was never held
        if self.opened:
            return self._leave(seen)
        if self.held is not None:
            return self._carry(seen, thing, place, hand)
        return self._reach(seen, thing, hand)

    def _reach(self, seen: dict[str, Any], thing: np.ndarray, hand: np.ndarray) -> np.ndarray:
        turn = seen["carried"][1]
        goal = thing + self.grip.along * turn[:, 0] + self.grip.rise * UP
        yaw = yaw_across(turn)
        aside = float(np.linalg.norm(hand[:2] - goal[:2]))
        name = self.grip.words[0]
        if self.closed or (aside < 0.01 and hand[2] - goal[2] < 0.01):
            self.phase, self.closed = f"grasp the {name}", self.closed + 1
            if self.closed > CLOSING:
                self.held = thing - hand
            return self._towards(seen, seen["goal"][0], yaw, CLOSE)
        self.phase = f"reach for the {name}"
        off = abs(seen["hand"][1][:, 1] @ across(yaw))
        if aside < 0.015 and off > 0.98:
            return self._towards(seen, goal, yaw, OPEN)
        return self._towards(seen, goal + ABOVE * UP, yaw, OPEN)

    def _carry(self, seen: dict[str, Any], thing: np.ndarray, place: np.ndarray, hand: np.ndarray) -> np.ndarray:
        name, where = self.grip.words
        aside = np.r_[place[:2] - thing[:2], 0.0]
        off, up = float(np.linalg.norm(aside)), thing[2] - place[2] - self.grip.over
        yaw = None
        if off > 0.02 and up < 0.03:
            self.phase = f"lift the {name}"
            return self._towards(seen, hand + (0.06 - up) * UP, yaw, CLOSE)
        if off > 0.01 and not self.phase.startswith("put"):
            self.phase = f"carry the {name} {where}"
            return self._towards(seen, hand + aside, yaw, CLOSE)
        self.phase = f"put the {name} {where}"
        if up < 0.004:
            self.opened, self.held = 1, None
            return self._leave(seen)
        return self._towards(seen, hand + aside - (up + 0.002) * UP, yaw, CLOSE)

    def _leave(self, seen: dict[str, Any]) -> np.ndarray:
        self.phase, self.opened = f"let go of the {self.grip.words[0]}", self.opened + 1
        rise = 0.0 if self.opened <= OPENING or self.opened > OPENING + 4 else 0.03
        return self._towards(seen, seen["goal"][0] + rise * UP, None, OPEN)

    def _towards(self, seen: dict[str, Any], position: np.ndarray, yaw: float | None, gripper: float) -> np.ndarray:
        """(7,) float32 that moves the controller's goal to a position and a yaw of a hand that points down; None: the
        turn it has."""
        goal, turn = seen["goal"]
        move = position - goal
        move *= min(1.0, STEP_M / max(float(np.linalg.norm(move)), 1e-9))
        angles = np.zeros(3)
        if yaw is not None:
            angles = rpy_of(matrix_of(np.array([0.0, 0.0, yaw])) @ POINTING_DOWN @ turn.T)
            angles *= min(1.0, STEP_RAD / max(float(np.linalg.norm(angles)), 1e-9))
        return np.r_[move, angles, gripper].astype(np.float32)


def across(yaw: float) -> np.ndarray:
    """(3,) direction in which the fingers of a hand that points down open."""
    return np.array([-np.sin(yaw), np.cos(yaw), 0.0])


def yaw_across(turn: np.ndarray) -> float:
    """The yaw, within a quarter turn, at which the fingers close along a lying thing's y axis."""
    yaw = np.arctan2(-turn[0, 1], turn[1, 1])
    return float((yaw + np.pi / 2) % np.pi - np.pi / 2)


def expert(suite: SuiteSpec, task: Task) -> SimplerExpert:
    """The expert of one episode. SimulatorError for a task it was not written for."""
    if task.name not in GRIPS or task.name not in TASKS:
        raise SimulatorError(
            "There is no scripted expert for this task",
            field="task",
            found=task.name,
            expected=", ".join(GRIPS),
            cure="leave this task out; --task chooses",
        )
    return SimplerExpert(GRIPS[task.name])
