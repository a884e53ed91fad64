"""LIBERO's scripted expert picks one thing up and puts it down: a state machine over privileged poses.

A phase follows from what is seen (where the hand is, whether the object moved with it), so that a drop, a push or a
disturbed hand sends it back to the phase that mends it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prts_core.sim.suites.libero.expert_grasp import Grasp
from prts_core.sim.suites.libero.expert_motion import CLOSE, OPEN, UP, Skill, action
from prts_core.sim.suites.libero.expert_scene import HAND_BOTTOM, ExpertScene

UPRIGHT = -0.85  # the vertical part of where the hand points


class PickPlace(Skill):
    """Carry one object to a place. `where(scene)`: (x, y, height of the support) of the object's middle; `anchor`: its
    middle now. `arrived`: what counts as there, in place of `within` (m) of the place. `twist(scene)`: how far
    (rad) the object must turn about the vertical before it goes down. `crowded`: things may hang over the
    object, and stand in its way down."""

    def __init__(
        self,
        name: str,
        grasp: Callable[[ExpertScene, list[np.ndarray]], Grasp],
        where: Callable[[ExpertScene], np.ndarray],
        anchor: Callable[[ExpertScene], np.ndarray],
        clearance: float,
        words: tuple[str, str],
        hand_above: float = -np.inf,
        within: float = 0.03,
        arrived: Callable[[ExpertScene], bool] | None = None,
        twist: Callable[[ExpertScene], float] | None = None,
        crowded: bool = False,
    ) -> None:
        self.name, self.plan, self.where, self.anchor, self.clearance = name, grasp, where, anchor, clearance
        self.words, self.hand_above, self.within = words, hand_above, within
        self.arrived, self.twist, self.crowded = arrived, twist, crowded
        self.grasp: Grasp | None = None
        self.seen_at = np.zeros(3)
        self.held: np.ndarray | None = None  # (3,) object in the hand's frame of reference when it was closed on
        self.closing: list[float] = []
        self.releasing = 0
        self.top = 0.0
        self.stuck = 0
        self.height = np.inf
        self.left = False  # once put down and left it is done wherever the hand goes, until it moves
        self.failed: list[np.ndarray] = []  # (2,) grips on the object that did not work
        self.phase = ""

    def done(self, scene: ExpertScene) -> bool:
        place = self.where(scene)
        aside = np.linalg.norm(scene.hand[:2] - self.anchor(scene)[:2])
        away = aside > 0.1 or scene.hand[2] > scene.extent(self.name)[1][2] + 0.01
        near = np.linalg.norm(self.anchor(scene)[:2] - place[:2]) < self.within
        there = near if self.arrived is None else self.arrived(scene)
        self.left = bool(there and self.held is None and (away or self.left))
        return self.left

    @property
    def busy(self) -> bool:
        return self.held is not None or bool(self.releasing)

    def act(self, scene: ExpertScene) -> np.ndarray:
        thing = scene.position(self.name)
        if self.held is not None and np.linalg.norm(thing - scene.hand - self.held) > 0.035:
            self._failed(scene)  # it slipped, or was never held
        if self.releasing:
            return self._release(scene)
        if self.held is not None:
            return self._carry(scene)
        if self.closing:
            return self._close(scene)
        return self._reach(scene)

    def _failed(self, scene: ExpertScene) -> None:
        if self.grasp is not None:
            low, high = scene.extent(self.name)
            self.failed.append(self.grasp.position[:2] - (low + high)[:2] / 2)
        self._again()

    def _again(self) -> None:
        self.grasp, self.held, self.closing, self.releasing = None, None, [], 0
        self.stuck, self.height = 0, np.inf

    def _reach(self, scene: ExpertScene) -> np.ndarray:
        thing = scene.position(self.name)
        if self.grasp is None or np.linalg.norm(thing - self.seen_at) > 0.01:
            self.grasp, self.seen_at = self.plan(scene, self.failed), thing.copy()
        goal, yaw = self.grasp.position, self.grasp.yaw
        aside = float(np.linalg.norm(scene.hand[:2] - goal[:2]))
        twist = abs(scene.yaw - yaw)
        self.phase = f"reach for the {self.words[0]}"
        if scene.approach[2] > UPRIGHT:  # it comes from a handle: the hand turns down above what is there
            return action(scene, scene.hand + UP, yaw, OPEN)
        over = max(scene.extent(self.name)[1][2] + 0.03, goal[2] + 0.05)
        if aside < 0.012 and twist < 0.1 and (scene.hand[2] < over + 0.03 or aside < 0.006):
            if scene.hand[2] - goal[2] < 0.005 and aside < 0.008:
                self.closing = [scene.opening]
                return self._close(scene)
            self.stuck = self.stuck + 1 if scene.hand[2] > self.height - 0.001 else 0
            self.height = min(self.height, scene.hand[2])
            if self.stuck > 10:  # something is under a finger
                self._failed(scene)
                return action(scene, scene.hand + UP, yaw, OPEN)
            return action(scene, goal, yaw, OPEN, 0.5 if scene.hand[2] < over else 1.0)
        if scene.hand[2] < over - 0.01 and aside > 0.03:  # come out upwards before going sideways
            return action(scene, np.r_[scene.hand[:2], over + 0.02], yaw, OPEN)
        fly = max(over, scene.top_along(scene.hand, goal, 0.08, self.name) + 0.03 if aside > 0.05 else over)
        if scene.hand[2] < fly - 0.02 and aside > 0.05:
            return action(scene, np.r_[scene.hand[:2] + 0.2 * (goal - scene.hand)[:2], fly], yaw, OPEN)
        return action(scene, np.r_[goal[:2], fly if aside > 0.05 else over], yaw, OPEN)

    def _close(self, scene: ExpertScene) -> np.ndarray:
        assert self.grasp is not None
        self.phase = f"grasp the {self.words[0]}"
        still = len(self.closing) > 2 and abs(self.closing[-1] - scene.opening) < 0.0005
        self.closing.append(scene.opening)
        if (still and len(self.closing) > 4) or len(self.closing) > 20:
            self.held, self.closing = scene.position(self.name) - scene.hand, []
            self.stuck, self.height = 0, np.inf
            place, anchor = self.where(scene), self.anchor(scene)
            over = scene.top_along(anchor, np.r_[place[:2], 0.0], 0.09, self.name)
            self.top = max(over, place[2])  # once: what a finger drags along must not lift it
        return action(scene, self.grasp.position, self.grasp.yaw, CLOSE)

    def _carry(self, scene: ExpertScene) -> np.ndarray:
        assert self.grasp is not None
        place, anchor = self.where(scene), self.anchor(scene)
        low, _ = scene.extent(self.name)
        aside = place[:2] - anchor[:2]
        off = float(np.linalg.norm(aside))
        turn = self.twist(scene) if self.twist is not None else 0.0
        yaw = scene.yaw + turn if abs(turn) > 0.02 else self.grasp.yaw if self.twist is None else scene.yaw
        rise = self.top + self.clearance - low[2]
        near_enough = 0.03 if self.phase.startswith("put") else 0.012
        if off > near_enough and rise > 0.02:
            self.phase = f"lift the {self.words[0]}"
            if self.crowded and (out := scene.way_out(self.name)) is not None:
                return action(scene, scene.hand + np.r_[out, 0.012 - max(low[2] - self.seen_at[2], 0.0)], yaw, CLOSE)
            near = 0.3 if rise < 0.08 and off > 0.2 else 0.0
            return action(scene, scene.hand + np.r_[near * aside, rise + 0.01], yaw, CLOSE)
        if off > near_enough or abs(turn) > 0.15:
            self.phase = f"carry the {self.words[0]} {self.words[1]}"
            return action(scene, scene.hand + np.r_[aside, rise if off > 0.05 else 0.0], yaw, CLOSE)
        self.phase = f"put the {self.words[0]} {self.words[1]}"
        drop = low[2] - place[2]
        if self.crowded:  # a wall may hold it up, or a finger
            self.stuck = self.stuck + 1 if low[2] > self.height - 0.001 else 0
            self.height = min(self.height, float(low[2]))
        if drop < 0.012 or (self.crowded and self.stuck > 8) or scene.hand[2] + HAND_BOTTOM < self.hand_above + 0.015:
            self.releasing = 1
            return self._release(scene)
        return action(scene, scene.hand + np.r_[aside, -max(drop - 0.004, 0.01)], yaw, CLOSE, 0.6)

    def _release(self, scene: ExpertScene) -> np.ndarray:
        assert self.grasp is not None
        self.phase = f"let go of the {self.words[0]}"
        self.held, yaw = None, self.grasp.yaw
        self.releasing += 1
        if scene.opening > 0.07 or self.releasing > 12:
            if scene.hand[2] > scene.extent(self.name)[1][2] + 0.04 or self.releasing > 30:
                self._again()
            return action(scene, scene.hand + UP, yaw, OPEN)
        return action(scene, scene.hand, yaw, OPEN)
