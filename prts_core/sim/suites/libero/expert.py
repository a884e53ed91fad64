"""LIBERO's scripted expert: a state machine over privileged poses that gives OSC_POSE actions and words for subtasks.

It does not know pictures, processes or recordings. A phase follows from what is seen (where the hand is, whether the
object moved with it), so that a drop, a push or a disturbed hand sends it back to the phase that mends it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prts_core.errors import SimulatorError
from prts_core.sim.suite import Environment, SuiteSpec, Task
from prts_core.sim.suites.libero.expert_scene import HAND_BOTTOM, Grasp, Scene, pinch, rim

STEP_M, STEP_RAD = 0.05, 0.5  # of one unit of an OSC_POSE action
OPEN, CLOSE = -1.0, 1.0
GAIN = 2.0
WIDEST = 0.072  # m, of what the fingers close around
UP = np.array([0.0, 0.0, 0.05])


def action(scene: Scene, target: np.ndarray, yaw: float, gripper: float, speed: float = 1.0) -> np.ndarray:
    """(7,) float32 towards a position (3,) and a yaw of the fingers' opening, the hand pointing down."""
    move = GAIN * (target - scene.hand) / STEP_M
    move[:2] *= speed / max(np.abs(move[:2]).max(), speed)
    move[2] = np.clip(move[2], -speed, speed)
    tilt = np.cross(scene.approach, [0.0, 0.0, -1.0])
    turn = np.r_[tilt[:2], (yaw - scene.yaw + np.pi) % (2 * np.pi) - np.pi]
    return np.r_[move, np.clip(GAIN * turn / STEP_RAD, -0.5, 0.5), gripper].astype(np.float32)


class Skill:
    """One goal of a task. `done`: holds in the scene; `act`: (7,) float32 and sets `phase`."""

    phase = ""

    def done(self, scene: Scene) -> bool:
        raise NotImplementedError

    def act(self, scene: Scene) -> np.ndarray:
        raise NotImplementedError


class PickPlace(Skill):
    """Carry one object to a place. `where(scene)`: (x, y, height of the support) of the object's middle."""

    def __init__(
        self,
        name: str,
        grasp: Callable[[Scene, list[np.ndarray]], Grasp],
        where: Callable[[Scene], np.ndarray],
        anchor: Callable[[Scene], np.ndarray],
        clearance: float,
        words: tuple[str, str],
        hand_above: float = -np.inf,
        within: float = 0.03,
    ) -> None:
        self.name, self.plan, self.where, self.anchor, self.clearance = name, grasp, where, anchor, clearance
        self.words, self.hand_above, self.within = words, hand_above, within
        self.grasp: Grasp | None = None
        self.seen_at = np.zeros(3)
        self.held: np.ndarray | None = None  # (3,) object in the hand's frame of reference when it was closed on
        self.closing: list[float] = []
        self.releasing = 0
        self.top = 0.0
        self.stuck = 0
        self.height = np.inf
        self.failed: list[np.ndarray] = []  # (2,) grips on the object that did not work
        self.phase = ""

    def done(self, scene: Scene) -> bool:
        place = self.where(scene)
        aside = np.linalg.norm(scene.hand[:2] - self.anchor(scene)[:2])
        away = aside > 0.1 or scene.hand[2] > scene.extent(self.name)[1][2] + 0.01
        return bool(np.linalg.norm(self.anchor(scene)[:2] - place[:2]) < self.within and self.held is None and away)

    def act(self, scene: Scene) -> np.ndarray:
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

    def _failed(self, scene: Scene) -> None:
        if self.grasp is not None:
            low, high = scene.extent(self.name)
            self.failed.append(self.grasp.position[:2] - (low + high)[:2] / 2)
        self._again()

    def _again(self) -> None:
        self.grasp, self.held, self.closing, self.releasing = None, None, [], 0
        self.stuck, self.height = 0, np.inf

    def _reach(self, scene: Scene) -> np.ndarray:
        thing = scene.position(self.name)
        if self.grasp is None or np.linalg.norm(thing - self.seen_at) > 0.01:
            self.grasp, self.seen_at = self.plan(scene, self.failed), thing.copy()
        goal, yaw = self.grasp.position, self.grasp.yaw
        aside = float(np.linalg.norm(scene.hand[:2] - goal[:2]))
        twist = abs(scene.yaw - yaw)
        self.phase = f"reach for the {self.words[0]}"
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

    def _close(self, scene: Scene) -> np.ndarray:
        assert self.grasp is not None
        self.phase = f"grasp the {self.words[0]}"
        still = len(self.closing) > 2 and abs(self.closing[-1] - scene.opening) < 0.0005
        self.closing.append(scene.opening)
        if (still and len(self.closing) > 4) or len(self.closing) > 20:
            self.held, self.closing = scene.position(self.name) - scene.hand, []
            place, anchor = self.where(scene), self.anchor(scene)
            over = scene.top_along(anchor, np.r_[place[:2], 0.0], 0.09, self.name)
            self.top = max(over, place[2])  # once: what a finger drags along must not lift it
        return action(scene, self.grasp.position, self.grasp.yaw, CLOSE)

    def _carry(self, scene: Scene) -> np.ndarray:
        assert self.grasp is not None
        place, anchor = self.where(scene), self.anchor(scene)
        low, _ = scene.extent(self.name)
        aside = place[:2] - anchor[:2]
        off = float(np.linalg.norm(aside))
        yaw = self.grasp.yaw
        rise = self.top + self.clearance - low[2]
        near_enough = 0.03 if self.phase.startswith("put") else 0.012
        if off > near_enough and rise > 0.02:
            self.phase = f"lift the {self.words[0]}"
            near = 0.3 if rise < 0.08 and off > 0.2 else 0.0
            return action(scene, scene.hand + np.r_[near * aside, rise + 0.01], yaw, CLOSE)
        if off > near_enough:
            self.phase = f"carry the {self.words[0]} {self.words[1]}"
            return action(scene, scene.hand + np.r_[aside, rise if off > 0.05 else 0.0], yaw, CLOSE)
        self.phase = f"put the {self.words[0]} {self.words[1]}"
        drop = low[2] - place[2]
        if drop < 0.012 or scene.hand[2] + HAND_BOTTOM < self.hand_above + 0.015:
            self.releasing = 1
            return self._release(scene)
        return action(scene, scene.hand + np.r_[aside, -max(drop - 0.004, 0.01)], yaw, CLOSE, 0.6)

    def _release(self, scene: Scene) -> np.ndarray:
        assert self.grasp is not None
        self.phase = f"let go of the {self.words[0]}"
        self.held, yaw = None, self.grasp.yaw
        self.releasing += 1
        if scene.opening > 0.07 or self.releasing > 12:
            if scene.hand[2] > scene.extent(self.name)[1][2] + 0.04 or self.releasing > 30:
                self._again()
            return action(scene, scene.hand + UP, yaw, OPEN)
        return action(scene, scene.hand, yaw, OPEN)


class LiberoExpert:
    """See prts_core.sim.suite.Expert. The goals of a task one after another, each again where it comes undone."""

    noise_weights = (1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.0)

    def __init__(self) -> None:
        self.skills: list[Skill] | None = None
        self.phase = ""

    def act(self, environment: Environment) -> np.ndarray:
        scene = Scene(environment.privileged())
        if self.skills is None:
            self.skills = skills_of(scene)
        skill = next((skill for skill in self.skills if not skill.done(scene)), self.skills[-1])
        chosen = skill.act(scene)
        self.phase = skill.phase
        return chosen


def spoken(name: str) -> str:
    """`akita_black_bowl_1` as people say it."""
    words = [word for word in name.split("_") if not word.isdigit()]
    return " ".join(words).removeprefix("akita ").removeprefix("new ").removeprefix("glazed rim porcelain ")


# How things are held that no gripper spans: (inside the outer edge, below the top, no handle).
_RIM = {
    "akita_black_bowl": (0.0065, 0.016, True),
    "porcelain_mug": (0.004, 0.02, False),
    "white_yellow_mug": (0.004, 0.02, False),
    "red_coffee_mug": (0.004, 0.02, False),
}


def skills_of(scene: Scene) -> list[Skill]:
    """One skill for each part of the goal, in its order. SimulatorError where there is none for a part."""
    goal = [(str(predicate).lower(), *names) for predicate, *names in scene.seen["goal"]]
    skills: list[Skill] = []
    for index, (predicate, *names) in enumerate(goal):
        known = predicate in ("in", "on") and names[0] in scene.seen["owners"] and _spans(scene, names[0])
        if not known or (predicate == "in" and "contain" not in names[1]):
            raise SimulatorError(
                "The scripted expert has no skill for a task's goal", field="goal",
                found=" ".join((predicate, *names)), expected="things a hand can hold, put on or into something open",
                cure="leave this task out; --task chooses",
            )  # fmt: skip
        sharing = [one for one in range(len(goal)) if goal[one][0] == "in" and goal[one][-1] == names[1]]
        apart = 0.06 * (sharing.index(index) - (len(sharing) - 1) / 2) if predicate == "in" else 0.0
        skills.append(_place(scene, names[0], names[1], apart))
    return skills


def _spans(scene: Scene, name: str) -> bool:
    """Can the hand hold it?"""
    if name.rsplit("_", 1)[0] in _RIM:
        return True
    return min(scene.width(name, yaw)[0] for yaw in np.linspace(0.0, np.pi, 24, endpoint=False)) < WIDEST


def _place(scene: Scene, name: str, target: str, apart: float) -> Skill:
    kind = name.rsplit("_", 1)[0]
    owners = scene.seen["owners"]
    parent = next((owner for owner in owners if target.startswith(owner)), None)
    inside = "contain" in target
    word = "into" if inside else "onto"

    def where(now: Scene) -> np.ndarray:
        place = now.position(target) + np.array([apart, 0.0, 0.0])
        if inside and parent is not None:
            return np.r_[place[:2], now.extent(parent)[0][2] + 0.02]
        if parent == target:
            return np.r_[place[:2], now.extent(target)[1][2]]
        support = now.support(place, name)
        return np.r_[place[:2], support if np.isfinite(support) else place[2]]

    def grasp(now: Scene, failed: list[np.ndarray]) -> Grasp:
        if kind in _RIM:
            inset, below, round_body = _RIM[kind]
            return rim(now, name, inset, below, where(now), failed, round_body)
        return pinch(now, name, 0.034, WIDEST)

    return PickPlace(
        name, grasp, where, lambda now: now.position(name), 0.04,
        (spoken(name), f"{word} the {spoken(parent or target)}"),
        hand_above=float(scene.extent(parent)[1][2]) if inside and parent is not None else -np.inf,
        within=0.06 if inside else 0.03,
    )  # fmt: skip


def expert(suite: SuiteSpec, task: Task) -> LiberoExpert:
    """The expert of one episode."""
    return LiberoExpert()
