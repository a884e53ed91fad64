"""LIBERO-Plus, camera viewpoints: the scene camera seen from elsewhere. The wrist camera stays.

Definition: LIBERO-Plus's, as its task names encode it (`_view_h_v_scale_rot_vert`): h degrees about the world's z axis,
v degrees about the y axis through the pivot, the distance from the pivot in percent, and two turns of the camera in
place, all rounded to 4 decimals on the way. A view by its numbers turns about the pivot of LIBERO-Plus's table scenes;
that its other scenes use the same one is not verified. Ours: which view a level means (steps through the published
ranges), about the middle of the scene's own table or floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.sim.suites.libero.perturb.draws import draw, levelled, only

KINDS = ("position", "distance", "orientation")
CAMERA = "agentview"
PIVOT = np.array([0.0, 0.0, 0.8])
# Published ranges: positions off by 15 to 75 degrees, distances of 1.01 to 2.00, turns of 2 to 10 degrees.
POSITION_DEGREES, DISTANCE_PERCENT, TURN_DEGREES = 15, 20, 2  # a level
ELEVATION = (-15.0, 30.0)  # degrees: lower it looks from under the table, higher it tips over


@dataclass(frozen=True)
class CameraPose:
    """Degrees, and the distance in percent of the original."""

    horizontal: int = 0
    vertical: int = 0
    scale: int = 100
    turn: int = 0
    tilt: int = 0


def view_of(settings: Mapping[str, Any], task: str) -> CameraPose:
    """Of {view: [h, v, scale, rot, vert]} or {level, kind, seed}. ConfigError for settings that are neither."""
    if "view" in settings:
        only("camera", settings, "view")
        numbers = settings["view"]
        ok = isinstance(numbers, (list, tuple)) and len(numbers) == 5 and all(type(n) is int for n in numbers)
        if not ok or not 1 <= numbers[2] <= 1000 or any(abs(n) > 360 for n in (*numbers[:2], *numbers[3:])):
            raise ConfigError(
                "A camera view is not one",
                field="camera.view",
                found=numbers,
                expected="[h, v, scale, rot, vert]: whole degrees from -360 to 360, scale 1 to 1000 percent",
            )
        return CameraPose(*numbers)
    kind, level, seed = levelled("camera", settings, KINDS)
    rng = draw("camera", kind, level, seed, task)
    if kind == "distance":
        return CameraPose(scale=100 + DISTANCE_PERCENT * level)
    angle = rng.uniform(0, 2 * np.pi)
    if kind == "orientation":
        turn = TURN_DEGREES * level * np.array([np.cos(angle), np.sin(angle)])
        return CameraPose(turn=round(turn[0]), tilt=round(turn[1]))
    off = POSITION_DEGREES * level
    vertical = float(np.clip(off * np.sin(angle), *ELEVATION))
    horizontal = np.sqrt(off**2 - vertical**2) * (1 if np.cos(angle) >= 0 else -1)
    return CameraPose(round(float(horizontal)), round(vertical))


def pose(
    position: np.ndarray, quaternion: np.ndarray, view: CameraPose, pivot: np.ndarray = PIVOT
) -> tuple[np.ndarray, np.ndarray]:
    """Where the camera goes: position (3,) m, unit quaternion (4,) w x y z, from where it stands. pivot: (3,) m."""
    h, v, scale, turn, tilt = astuple(view)
    place, facing = np.asarray(position, np.float64), np.asarray(quaternion, np.float64)
    if v:
        lift = _about_y(v)
        place, facing = np.round(_turned(place - pivot, lift) + pivot, 4), np.round(_times(lift, facing), 4)
    if h:
        swing = _about_z(h)
        place, facing = np.round(_turned(place, swing), 4), np.round(_times(swing, facing), 4)
    if scale != 100:
        place = np.round(pivot + (place - pivot) * scale / 100, 4)
    if turn:
        facing = np.round(_times(_about_z(turn), facing), 4)
    if tilt:
        facing = np.round(_times(_about_y(tilt), facing), 4)
    return place, facing / np.linalg.norm(facing)


def begin(model: Any, settings: Mapping[str, Any], task: str, height: float) -> None:
    """Move the scene camera of a MjModel. height: of the table or floor, m."""
    camera = model.camera(CAMERA).id
    pivot = PIVOT if "view" in settings else np.array([0.0, 0.0, height])
    place, facing = pose(model.cam_pos[camera], model.cam_quat[camera], view_of(settings, task), pivot)
    model.cam_pos[camera], model.cam_quat[camera] = place, facing


def _about_z(degrees: float) -> np.ndarray:
    half = np.radians(degrees) / 2
    return np.array([np.cos(half), 0.0, 0.0, np.sin(half)])


def _about_y(degrees: float) -> np.ndarray:
    """Positive lifts what lies ahead along x."""
    half = -np.radians(degrees) / 2
    return np.array([np.cos(half), 0.0, np.sin(half), 0.0])


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.r_[a[0] * b[0] - a[1:] @ b[1:], vector]


def _turned(vector: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    around = 2 * np.cross(quaternion[1:], vector)
    return vector + quaternion[0] * around + np.cross(quaternion[1:], around)
