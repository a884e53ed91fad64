"""Where LIBERO's scripted expert takes hold: a search over the wrist's angles for what is narrow, free and in reach.

It knows a scene's boxes, and neither tasks nor phases. World frame, metres, radians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prts_core.sim.suites.libero.expert_scene import FINGER_BELOW, NEUTRAL, ExpertScene


@dataclass(frozen=True)
class Grasp:
    """Where the grip site goes: position (3,) and the yaw of the fingers' opening; `cost` 0: nothing is in the way."""

    position: np.ndarray
    yaw: float
    cost: float


def turned(angle: float, neutral: float = NEUTRAL) -> float:
    """The yaw equal to `angle` up to a half turn that is nearest to the neutral one: the wrist's range."""
    return neutral + (angle - neutral + np.pi / 2) % np.pi - np.pi / 2


def pinch(scene: ExpertScene, name: str, below_top: float, widest: float) -> Grasp:
    """Across the object's narrowest free width, through its middle, fingers `below_top` under its top at most."""
    low, high = scene.extent(name)
    height = max((low[2] + high[2]) / 2, high[2] - below_top, low[2] + FINGER_BELOW + 0.002)
    height = min(height, max(high[2] - 0.008, low[2] + FINGER_BELOW + 0.002))
    best: Grasp | None = None
    for step in range(24):
        yaw = turned(step * np.pi / 24)
        width, along = scene.width(name, yaw)
        length, across = scene.width(name, yaw + np.pi / 2)
        axis, side = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
        for shift in (0.0, -0.25, 0.25) if length > 0.05 else (0.0,):
            position = np.r_[along * axis + (across + shift * length) * side, height]
            score = width + 0.01 * abs(yaw - NEUTRAL) + 0.2 * abs(shift) * length
            score += max(width - widest, 0.0) * 100 + 10 * scene.blocked(position, yaw, name)
            if best is None or score < best.cost:
                best = Grasp(position, yaw, score)
    assert best is not None
    return best


def level_pinch(scene: ExpertScene, name: str, widest: float) -> Grasp | None:
    """Of a thing that is too wide as a whole: across it at the height where a pinch spans it with most room; None where
    there is no such height."""
    corners = scene.boxes(name)
    low, high = scene.extent(name)
    best: Grasp | None = None
    for height in np.arange(high[2] - 0.008, (low[2] + high[2]) / 2 - 0.01, -0.008):
        cut = corners[(corners[..., 2].min(1) < height + 0.012) & (corners[..., 2].max(1) > height - FINGER_BELOW)]
        if not len(cut):
            continue
        for step in range(24):
            yaw = turned(step * np.pi / 24)
            axis, side = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
            shadow = cut.reshape(-1, 3)[:, :2] @ axis
            width, along = float(np.ptp(shadow)), float(shadow.max() + shadow.min()) / 2
            if width > widest:
                continue
            position = np.r_[along * axis + (scene.position(name)[:2] @ side) * side, height]
            score = width + 0.01 * abs(yaw - NEUTRAL) + 0.2 * (high[2] - height)
            score += 10 * scene.blocked(position, yaw, name)
            if best is None or score < best.cost:
                best = Grasp(position, yaw, score)
    return best


def rim(
    scene: ExpertScene,
    name: str,
    inset: float,
    below_top: float,
    place: np.ndarray,
    failed: Sequence[np.ndarray] = (),
    round_body: bool = True,
    tight: bool = False,
) -> Grasp:
    """One finger inside, one outside: on the rim at the angle with the most room, `inset` inside the outer edge,
    where the arm stays bent, there and at the place (3,), and away from what `failed`: offsets (2,) from the middle.
    A body that is not round has a handle; its own middle counts then, and the side of the handle does not. `tight`: the
    hand must have room at the place too."""
    low, high = scene.extent(name)
    center = (low + high)[:2] / 2 if round_body else scene.position(name)[:2]
    directions = [np.array([np.cos(angle), np.sin(angle)]) for angle in np.arange(24) * np.pi / 12]
    reaches = [float((scene.corners(name)[:, :2] @ out).max() - center @ out) for out in directions]
    best: Grasp | None = None
    for step, (out, reach) in enumerate(zip(directions, reaches, strict=True)):
        if not round_body and reach > min(reaches) + 0.006:
            continue
        angle = step * np.pi / 12
        position = np.r_[center + (reach - inset) * out, high[2] - below_top]
        yaw = turned(angle)
        cost = scene.blocked(position, yaw, name, tall=tight)
        above = np.r_[0.0, 0.0, 0.05]
        there = position + place - np.r_[center, low[2]] + above
        score = 10 * cost + 0.02 * abs(yaw - NEUTRAL) + 0.05 * float(np.linalg.norm(position[:2] - scene.hand[:2]))
        score += 2 * scene.stretch(position + above) + 2 * scene.stretch(there)
        score += 10 * scene.blocked(there - above, yaw, name, tall=True) if tight else 0.0
        score += sum(0.3 for offset in failed if np.linalg.norm(position[:2] - center - offset) < 0.02)
        if best is None or score < best.cost:
            best = Grasp(position, yaw, score)
    assert best is not None
    return best
