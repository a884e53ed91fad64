"""LIBERO's scripted expert moves fixtures: it turns knobs, pulls drawers open, pushes drawers and doors shut, and drags
flat things over a table.

Where to touch is read from the boxes of what a joint moves, and how far from the ranges in which LIBERO calls it open,
closed or turned on. World frame, metres, radians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prts_core.sim.suites.libero.expert_motion import CLOSE, OPEN, UP, Skill, action, aim, travel
from prts_core.sim.suites.libero.expert_scene import FINGER_BELOW, NEUTRAL, ExpertScene

DOWN = np.array([0.0, 0.0, -1.0])
FACE = 0.006  # m, what of a shape counts as its outermost part
PULL_TILT, PUSH_TILT = np.radians(78.0), np.radians(35.0)  # of the hand, from straight down
LEAD = 0.04  # m, that a moving hand aims ahead of what it moves
BEYOND = 0.5  # of a range, past its edge: what is let go of may swing back


@dataclass(frozen=True)
class Wish:
    """A joint's value beyond `edge`, upwards (sign 1) or downwards (-1); `enough`: where a hand may leave it."""

    joint: str
    edge: float
    enough: float
    sign: float

    def holds(self, scene: ExpertScene) -> bool:
        return (scene.seen["links"][self.joint]["value"] - self.edge) * self.sign > 0.0

    def left(self, scene: ExpertScene) -> float:
        """How far it still has to go, 0 where it is far enough."""
        return max((self.enough - scene.seen["links"][self.joint]["value"]) * self.sign, 0.0)


def wish(scene: ExpertScene, fixture: str, joint: str, wanted: str, other: str) -> Wish:
    """Into a fixture's range `wanted`, coming from its range `other`: beyond the end that is nearer to that one."""
    low, high = scene.seen["ranges"][fixture][wanted]
    sign = 1.0 if low + high > sum(scene.seen["ranges"][fixture][other]) else -1.0
    edge = low if sign > 0 else high
    return Wish(joint, edge, edge + sign * BEYOND * (high - low), sign)


def _rows(scene: ExpertScene, joint: str, way: np.ndarray) -> np.ndarray:
    """(n, 8, 3) corners of the boxes that are outermost along `way`."""
    corners = scene.moved_by(joint)
    reach = (corners @ way).max(axis=1)
    return corners[reach > reach.max() - FACE]


class Turn(Skill):
    """A knob that turns about an upright axis: pinch its bar above the axis and turn the hand with it."""

    def __init__(self, wanted: Wish, words: str) -> None:
        self.wish, self.words = wanted, words
        self.closing: list[float] = []
        self.held = False
        self.yaw: float | None = None

    def done(self, scene: ExpertScene) -> bool:
        return self.wish.holds(scene)

    def act(self, scene: ExpertScene) -> np.ndarray:
        link = scene.seen["links"][self.wish.joint]
        bar = _rows(scene, self.wish.joint, -DOWN).reshape(-1, 3)
        top = float(bar[:, 2].max())
        goal = np.r_[link["anchor"][:2], top - 0.018]
        left = self.wish.left(scene) * self.wish.sign
        if self.yaw is None:
            self.yaw = _across(bar, left)
        self.phase = f"reach for the {self.words}"
        if self.held:
            self.phase = f"turn the {self.words}"
            if abs(scene.yaw - self.yaw) > 1.3 or np.linalg.norm(scene.hand[:2] - goal[:2]) > 0.03:
                self.held, self.yaw = False, None  # it slipped: from the start
                return action(scene, scene.hand + UP, scene.yaw, OPEN)
            return action(scene, goal, scene.yaw + 0.5 * float(np.sign(left)), CLOSE)
        if self.closing:
            self.phase = f"grasp the {self.words}"
            still = len(self.closing) > 4 and abs(self.closing[-1] - scene.opening) < 0.0005
            self.closing.append(scene.opening)
            if still or len(self.closing) > 20:
                self.held, self.closing = True, []
            return action(scene, goal, self.yaw, CLOSE)
        aside, twist = float(np.linalg.norm(scene.hand[:2] - goal[:2])), abs(scene.yaw - self.yaw)
        if aside < 0.01 and twist < 0.1:
            if scene.hand[2] - goal[2] < 0.006:
                self.closing = [scene.opening]
            return action(scene, goal, self.yaw, OPEN, 0.6)
        over = top + 0.05
        fly = max(over, scene.top_along(scene.hand, goal, 0.08, "") + 0.03) if aside > 0.05 else over
        if aside > 0.05 and scene.hand[2] < fly - 0.02:
            return action(scene, np.r_[scene.hand[:2], fly], self.yaw, OPEN)
        return action(scene, np.r_[goal[:2], fly], self.yaw, OPEN)


def _across(bar: np.ndarray, turn: float) -> float:
    """The yaw across a bar's (n, 3) narrow side whose way over `turn` stays nearest to the wrist's home."""
    yaws = np.arange(24) * np.pi / 24
    widths = [np.ptp(bar[:, :2] @ [np.cos(yaw), np.sin(yaw)]) for yaw in yaws]
    narrow = float(yaws[int(np.argmin(widths))])
    ways = [narrow + half * np.pi for half in (-2, -1, 0, 1, 2)]
    return min(ways, key=lambda yaw: max(abs(yaw - NEUTRAL), abs(yaw + turn - NEUTRAL)))


class Pull(Skill):
    """A drawer by its handle: the hand comes along the drawer's way, pinches the bar and draws it out."""

    def __init__(self, wanted: Wish, words: str) -> None:
        self.wish, self.words = wanted, words
        self.closing: list[float] = []
        self.held = False
        self.leaving = False
        self.near = False
        self.opening: np.ndarray | None = None

    def done(self, scene: ExpertScene) -> bool:
        return self.wish.holds(scene) and not self.held and (not self.leaving or self._away(scene) > 0.07)

    def _away(self, scene: ExpertScene) -> float:
        return float(np.linalg.norm(scene.hand - self._bar(scene)[0]))

    def _way(self, scene: ExpertScene) -> np.ndarray:
        return scene.seen["links"][self.wish.joint]["axis"] * self.wish.sign

    def _bar(self, scene: ExpertScene) -> tuple[np.ndarray, np.ndarray]:
        """The handle's middle (3,) and its narrow direction (3,) across the drawer's way."""
        bar = _rows(scene, self.wish.joint, self._way(scene)).reshape(-1, 3)
        low, high = bar.min(0), bar.max(0)
        level = np.cross(self._way(scene), DOWN)
        upright = float(high[2] - low[2]) < float(np.ptp(bar @ level))
        return (low + high) / 2, -DOWN if upright else level

    def act(self, scene: ExpertScene) -> np.ndarray:
        way = self._way(scene)
        bar, narrow = self._bar(scene)
        tilt = PULL_TILT if narrow[2] else np.pi / 2
        approach = -way * np.sin(tilt) + DOWN * np.cos(tilt)
        if self.opening is None:
            across = narrow - (narrow @ approach) * approach
            across /= np.linalg.norm(across)
            sides = (across, -across)
            self.opening = min(sides, key=lambda side: float(np.linalg.norm(scene.turn_to(approach, side))))
        if self.leaving:
            self.phase = f"let go of the {self.words}"
            self.held = False
            if self._away(scene) > 0.09:
                self.leaving = self.near = False
            back = -approach * (0.05 if scene.opening > 0.06 else 0.0)
            return aim(scene, scene.hand + back, approach, self.opening, OPEN)
        if self.held:
            self.phase = f"pull the {self.words} open"
            if float(np.linalg.norm(scene.hand - bar)) > 0.03:
                self.held = self.near = False
            elif self.wish.left(scene) < 0.002:
                self.leaving = True
            return aim(scene, bar + way * min(LEAD, self.wish.left(scene) + 0.005), approach, self.opening, CLOSE, 0.8)
        if self.closing:
            self.phase = f"grasp the {self.words}"
            still = len(self.closing) > 4 and abs(self.closing[-1] - scene.opening) < 0.0005
            self.closing.append(scene.opening)
            if still or len(self.closing) > 20:
                self.held, self.closing = True, []
            return aim(scene, bar, approach, self.opening, CLOSE)
        self.phase = f"reach for the {self.words}"
        before = bar - approach * 0.1
        off = scene.hand - bar
        along = float(off @ approach)
        aside = float(np.linalg.norm(off - along * approach))
        straight = float(np.linalg.norm(scene.turn_to(approach, self.opening))) < 0.12
        self.near = straight and aside < (0.02 if self.near else 0.008) and along > -0.14
        if not self.near:
            return travel(scene, before, approach, self.opening, OPEN, 0.12)
        if along > -0.006:
            self.closing = [scene.opening]
        return aim(scene, bar + 0.002 * approach, approach, self.opening, OPEN, 0.5)


class Push(Skill):
    """A drawer or door shut: the closed hand leans on what stands out furthest against its way and follows it."""

    def __init__(self, wanted: Wish, words: str) -> None:
        self.wish, self.words = wanted, words
        self.pushing = False
        self.opening: np.ndarray | None = None

    def done(self, scene: ExpertScene) -> bool:
        return self.wish.holds(scene)

    def _way(self, scene: ExpertScene) -> np.ndarray:
        """(3,) level: where the part that is furthest out goes next."""
        link = scene.seen["links"][self.wish.joint]
        if link["slides"]:
            return link["axis"] * self.wish.sign
        corners = scene.moved_by(self.wish.joint).reshape(-1, 3)
        arm = corners[np.argmax(np.linalg.norm((corners - link["anchor"])[:, :2], axis=1))] - link["anchor"]
        way = np.cross(link["axis"] * self.wish.sign, arm) * [1, 1, 0]
        return way / np.linalg.norm(way)

    def act(self, scene: ExpertScene) -> np.ndarray:
        way = self._way(scene)
        part = _rows(scene, self.wish.joint, -way).reshape(-1, 3)
        middle = (part.min(0) + part.max(0)) / 2
        contact = middle + way * (float((part @ way).min()) - float(middle @ way))
        approach = way * np.sin(PUSH_TILT) + DOWN * np.cos(PUSH_TILT)
        level = np.cross(way, DOWN)
        if self.opening is None:
            sides = (level, -level)
            self.opening = min(sides, key=lambda side: float(np.linalg.norm(scene.turn_to(approach, side))))
        self.opening = level if self.opening @ level > 0 else -level
        off = scene.hand - contact
        along = float(off @ way)
        aside = float(np.linalg.norm(off - along * way))
        self.phase = f"push the {self.words} shut"
        self.pushing = aside < (0.05 if self.pushing else 0.02) and -0.14 < along < 0.03
        if self.pushing:
            return aim(scene, contact + way * LEAD, approach, self.opening, CLOSE)
        self.phase = f"reach for the {self.words}"
        return travel(scene, contact - way * 0.08, approach, self.opening, CLOSE)


class Drag(Skill):
    """A flat thing with a hollow, over the table: the closed fingers stand in the hollow and take it along."""

    def __init__(self, name: str, where: Callable[[ExpertScene], np.ndarray], words: tuple[str, str]) -> None:
        self.name, self.where, self.words = name, where, words

    def done(self, scene: ExpertScene) -> bool:
        return float(np.linalg.norm(scene.position(self.name)[:2] - self.where(scene)[:2])) < 0.01

    def act(self, scene: ExpertScene) -> np.ndarray:
        low, high = scene.extent(self.name)
        middle = (low + high)[:2] / 2
        goal = np.r_[middle, scene.floor(middle, self.name) + FINGER_BELOW + 0.003]
        aside = float(np.linalg.norm(scene.hand[:2] - middle))
        self.phase = f"reach for the {self.words[0]}"
        if scene.hand[2] - goal[2] < 0.008 and aside < (high - low)[:2].min() / 2:
            self.phase = f"push the {self.words[0]} {self.words[1]}"
            ahead = self.where(scene)[:2] - scene.position(self.name)[:2]
            return action(scene, np.r_[scene.hand[:2] + ahead, goal[2] - 0.002], NEUTRAL, CLOSE, 0.5)
        fly = max(high[2] + 0.05, scene.top_along(scene.hand, goal, 0.08, self.name) + 0.03 if aside > 0.05 else 0.0)
        if aside > 0.01:
            return action(scene, np.r_[goal[:2] if scene.hand[2] > fly - 0.02 else scene.hand[:2], fly], NEUTRAL, CLOSE)
        return action(scene, goal, NEUTRAL, CLOSE, 0.5)
