"""Geometry for LIBERO's scripted expert: extents of objects, heights to fly at, room for a hand.

It knows the boxes of `privileged.py` and the Panda's hand, and neither tasks nor phases. World frame, metres, radians.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)  # (8, 3)
HAND_BOTTOM = 0.026  # of the hand's body above the grip site
FINGER_BELOW = 0.006  # tips below the grip site
FINGER_OUT = 0.046  # outer face of an open finger from the grip site along the opening
WRIST_OUT, WRIST_UP, SHOULDER_UP = 0.088, 0.204, 0.333  # of the Panda
COMFORT = 0.64  # of at most 0.70 m between shoulder and wrist: an arm that is straight cannot be steered
NEUTRAL = np.pi / 2  # yaw of the opening (finger 1 to finger 2) in the robot's home pose


class ExpertScene:
    """One look at the privileged state."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen
        self.hand: np.ndarray = seen["hand"]
        fingers = seen["fingers"][1] - seen["fingers"][0]
        self.opening = float(np.linalg.norm(fingers))
        self.across: np.ndarray = fingers / max(self.opening, 1e-9)
        self.yaw = float(np.arctan2(fingers[1], fingers[0]))
        self.approach: np.ndarray = seen["hand_mat"][:, 2]

    def turn_to(self, approach: np.ndarray, opening: np.ndarray) -> np.ndarray:
        """(3,) axis times angle to where the hand points along `approach` and opens along `opening`."""
        wanted = np.column_stack([opening, np.cross(approach, opening), approach])
        now = np.column_stack([self.across, np.cross(self.approach, self.across), self.approach])
        off = wanted @ now.T
        axis = np.array([off[2, 1] - off[1, 2], off[0, 2] - off[2, 0], off[1, 0] - off[0, 1]])
        angle = float(np.arccos(np.clip((np.trace(off) - 1) / 2, -1.0, 1.0)))
        return axis / max(float(np.linalg.norm(axis)), 1e-9) * angle

    def stretch(self, position: np.ndarray) -> float:
        """How far beyond comfort (0) the arm would be with the grip site there, pointing down: shoulder to wrist."""
        out = np.linalg.norm(position[:2] - self.seen["base"][:2]) - WRIST_OUT
        up = position[2] + WRIST_UP - self.seen["base"][2] - SHOULDER_UP
        return float(max(np.hypot(out, up) - COMFORT, 0.0))

    def position(self, name: str) -> np.ndarray:
        """(3,) of an object's body or of a site."""
        seen = self.seen
        return seen["objects"][name][0] if name in seen["objects"] else seen["sites"][name][0]

    def rotation(self, name: str) -> np.ndarray:
        return self.seen["objects"][name][1]

    def _of(self, name: str) -> np.ndarray:
        return self.seen["box_owner"] == self.seen["owners"].index(name)

    def corners(self, name: str) -> np.ndarray:
        """(8 n, 3) corners of the object's boxes."""
        return self._corners(self._of(name))

    def boxes(self, name: str) -> np.ndarray:
        """(n, 8, 3) corners of each of the object's boxes."""
        return self.corners(name).reshape(-1, 8, 3)

    def moved_by(self, joint: str) -> np.ndarray:
        """(n, 8, 3) corners of each box that moves with a fixture's joint."""
        rows = self.seen["links"][joint]["boxes"]
        return self._corners(rows).reshape(len(rows), 8, 3)

    def _corners(self, mask: np.ndarray) -> np.ndarray:
        seen = self.seen
        local = CORNERS[None] * seen["box_half"][mask][:, None]  # (n, 8, 3)
        return (np.einsum("nij,nkj->nki", seen["box_mat"][mask], local) + seen["box_center"][mask][:, None]).reshape(
            -1, 3
        )

    def extent(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (3,), (3,) of the world-aligned box around an object."""
        corners = self.corners(name)
        return corners.min(0), corners.max(0)

    def top_along(self, start: np.ndarray, end: np.ndarray, reach: float, without: str) -> float:
        """Highest point of whatever lies within `reach` (horizontally) of the way; -inf where nothing does.

        What is beside or behind the start does not count: the way leads off from it.
        """
        ahead = end[:2] - start[:2]
        start = start[:2] + ahead * min(reach / max(float(np.linalg.norm(ahead)), 1e-9), 1.0)
        mask = self.seen["box_owner"] != (self.seen["owners"].index(without) if without else -2)
        seen = self.seen
        centers, span = seen["box_center"][mask], end[:2] - start[:2]
        along = np.clip(((centers[:, :2] - start[:2]) @ span) / max(span @ span, 1e-9), 0.0, 1.0)
        nearest = start[:2] + along[:, None] * span
        # The nearest point of each box to the segment, in the box's own frame.
        offset = np.c_[nearest - centers[:, :2], np.zeros(len(centers))]
        local = np.einsum("nji,nj->ni", seen["box_mat"][mask], offset)
        outside = np.maximum(np.abs(local) - seen["box_half"][mask], 0.0)
        near = np.linalg.norm(outside, axis=1) < reach
        heights = centers[:, 2] + np.einsum("nj,nj->n", np.abs(seen["box_mat"][mask][:, 2]), seen["box_half"][mask])
        return float(heights[near].max(initial=-np.inf))

    def floor(self, place: np.ndarray, name: str) -> float:
        """Top of a thing itself at a point (2,); -inf where it is not."""
        return self._top(place, self._of(name))

    def support(self, place: np.ndarray, without: str) -> float:
        """Top of what is under a point (2,): of boxes that cover it; -inf where none does."""
        return self._top(place, ~self._of(without))

    def _top(self, place: np.ndarray, other: np.ndarray) -> float:
        seen = self.seen
        offset = np.c_[place[:2] - seen["box_center"][:, :2], np.zeros(len(other))]
        local = np.abs(np.einsum("nji,nj->ni", seen["box_mat"], offset))
        tops = seen["box_center"][:, 2] + np.einsum("nj,nj->n", np.abs(seen["box_mat"][:, 2]), seen["box_half"])
        return float(tops[other & (local[:, :2] < seen["box_half"][:, :2]).all(1)].max(initial=-np.inf))

    def way_out(self, name: str) -> np.ndarray | None:
        """(2,) the shortest way from under what hangs over a thing; None where nothing does."""
        low, high = self.extent(name)
        middle, radius = (low + high) / 2, float((high - low)[:2].max()) / 2
        if self.top_along(middle, middle, radius, name) < high[2]:
            return None
        angles = np.arange(16) * np.pi / 8
        for far in np.arange(0.01, 0.16, 0.01):
            for out in far * np.stack([np.cos(angles), np.sin(angles)], axis=1):
                if self.top_along(middle[:2] + out, middle[:2] + out, radius + 0.01, name) < high[2]:
                    return out
        return None

    def blocked(
        self, position: np.ndarray, yaw: float, without: str, opening: float = FINGER_OUT, tall: bool = False
    ) -> float:
        """How much of an open hand at a grasp would be inside things other than `without`: 0 is free. `tall`: and
        on its way down to there."""
        points = _hand_points(opening) @ _turn(yaw).T + position
        if tall:
            points = np.concatenate([points + up for up in _WAY_DOWN])
        mask = self.seen["box_owner"] != self.seen["owners"].index(without)
        near = mask & (np.linalg.norm(self.seen["box_center"] - position, axis=1) < 0.5)
        seen = self.seen
        local = np.einsum(
            "nji,npj->npi", seen["box_mat"][near], points[None] - seen["box_center"][near][:, None]
        )  # (n, points, 3)
        depth = (seen["box_half"][near][:, None] + 0.006 - np.abs(local)).min(-1)
        return float(np.maximum(depth, 0.0).max(0, initial=0.0).sum())

    def within(self, site: str, point: np.ndarray) -> bool:
        """Is a point (3,) inside a region's box? As LIBERO has it, which turns the box's size and not its axes."""
        place, mat, half = self.seen["sites"][site]
        return bool((np.abs(point - place) < np.abs(mat @ half)).all())

    def width(self, name: str, yaw: float) -> tuple[float, float]:
        """(width, middle) of an object along a yaw, from the corners' shadow on it."""
        shadow = self.corners(name)[:, :2] @ np.array([np.cos(yaw), np.sin(yaw)])
        return float(np.ptp(shadow)), float((shadow.max() + shadow.min()) / 2)


def _turn(yaw: float) -> np.ndarray:
    """(3, 3) from the hand's frame (x along the opening, z up) to the world."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


_WAY_DOWN = np.array([[0.0, 0.0, up] for up in (0.0, 0.04, 0.08, 0.12, 0.16)])


def _hand_points(opening: float) -> np.ndarray:
    """(P, 3) sample points of fingers and hand around the grip site; x along the opening."""
    fingers = [
        (side * (opening + x), y, z)
        for side in (-1, 1)
        for x in (-0.034, -0.022, -0.011, 0.0, 0.012)  # they sweep what lies between when they close
        for y in (-0.01, 0.0, 0.01)
        for z in (-FINGER_BELOW, 0.01, 0.03, 0.05)
    ]
    hand = [
        (x, y, z)
        for x in np.linspace(-0.1, 0.1, 11)
        for y in (-0.03, 0.0, 0.03)
        for z in (HAND_BOTTOM + 0.004, 0.06, 0.09)
    ]
    return np.array(fingers + hand, float)
