"""Convert numbers from one convention to another: rotations, grippers, units. Arrays in, arrays out.

Values that contradict the convention they are said to follow are refused.
"""

from __future__ import annotations

import numpy as np

from prts_core.config.mapping import Gripper, Rotation

ROTATION_WIDTH: dict[Rotation, int] = {
    "axis-angle": 3,
    "quaternion-wxyz": 4,
    "quaternion-xyzw": 4,
    "6d": 6,
    "rpy": 3,
    "matrix": 9,
}
# Families of units, each with the factor to its first.
_UNITS: tuple[dict[str, float], ...] = (
    {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "0.1mm": 1e-4},
    {"rad": 1.0, "deg": np.pi / 180},
    {"rad/s": 1.0, "deg/s": np.pi / 180, "rpm": np.pi / 30},
    {"m/s": 1.0, "cm/s": 1e-2, "mm/s": 1e-3},
    {"N m": 1.0, "mN m": 1e-3},
    {"N": 1.0, "mN": 1e-3},
    {"1": 1.0, "percent": 1e-2},
    {"s": 1.0, "ms": 1e-3},
)
_UNIT_TOLERANCE = 1e-2  # of a quaternion's length, of a matrix's columns: what rounding in a recorder leaves
_GRIPPER_TOLERANCE = 0.05  # of the range between open and closed: fingers overshoot a little


class ConventionError(ValueError):
    """Numbers that contradict their convention. row: of the array. found, expected: for the reader."""

    def __init__(self, row: int, found: str, expected: str) -> None:
        super().__init__(f"row {row}: {found}, not {expected}")
        self.row, self.found, self.expected = row, found, expected


def unit_factor(source: str, target: str) -> float | None:
    """What a number in `source` is multiplied by to be in `target`; None where they do not measure the same."""
    if source == target:
        return 1.0
    for family in _UNITS:
        if source in family and target in family:
            return family[source] / family[target]
    return None


def known_units() -> str:
    return "; ".join(", ".join(family) for family in _UNITS)


def convert_gripper(values: np.ndarray, source: Gripper, target: Gripper) -> np.ndarray:
    """(T, n) openings from one range to another, linearly. Raises ConventionError for values outside `source`."""
    low, high = min(source.open, source.closed), max(source.open, source.closed)
    slack = _GRIPPER_TOLERANCE * (high - low)
    outside = np.argwhere((values < low - slack) | (values > high + slack))
    if len(outside):
        row, column = outside[0].tolist()
        raise ConventionError(row, f"{values[row, column]:g}", f"{low:g} to {high:g}, as {source} says")
    if source == target:
        return values
    share = (values - source.open) / (source.closed - source.open)
    return target.open + share * (target.closed - target.open)


def convert_rotation(values: np.ndarray, source: Rotation, target: Rotation) -> np.ndarray:
    """(T, width of source) to (T, width of target), float64. Equal conventions change nothing; both quaternions keep
    their sign. Otherwise quaternions have w >= 0 and axis-angles an angle in [0, pi]. Raises ConventionError."""
    values = np.asarray(values, np.float64)
    matrices = _to_matrix(values, source)  # also where nothing changes: this is what checks the numbers
    if source == target:
        return values
    if source == "quaternion-wxyz" and target == "quaternion-xyzw":
        return values[:, [1, 2, 3, 0]]
    if source == "quaternion-xyzw" and target == "quaternion-wxyz":
        return values[:, [3, 0, 1, 2]]
    return _from_matrix(matrices, target)


def _to_matrix(values: np.ndarray, kind: Rotation) -> np.ndarray:
    from scipy.spatial.transform import Rotation as Turn  # here: most conversions turn nothing, and it loads slowly

    if kind == "axis-angle":
        return Turn.from_rotvec(values).as_matrix()
    if kind in ("quaternion-wxyz", "quaternion-xyzw"):
        _require_near_one(np.linalg.norm(values, axis=1), "a quaternion of length")
        return Turn.from_quat(values, scalar_first=kind == "quaternion-wxyz").as_matrix()
    if kind == "6d":
        first, second = values[:, :3], values[:, 3:]
        length = np.linalg.norm(first, axis=1)
        if (short := np.flatnonzero(length < 1e-6)).size:
            raise ConventionError(int(short[0]), "a first column of length 0", "two columns of a rotation matrix")
        x = first / length[:, None]
        rest = second - (x * second).sum(1, keepdims=True) * x
        length = np.linalg.norm(rest, axis=1)
        if (short := np.flatnonzero(length < 1e-6)).size:
            raise ConventionError(int(short[0]), "two parallel columns", "two columns of a rotation matrix")
        y = rest / length[:, None]
        return np.stack([x, y, np.cross(x, y)], axis=2)
    if kind == "rpy":
        return Turn.from_euler("xyz", values).as_matrix()
    matrices = values.reshape(-1, 3, 3)
    off = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    wrong = np.flatnonzero((off > 2 * _UNIT_TOLERANCE) | (np.linalg.det(matrices) < 0))
    if wrong.size:
        raise ConventionError(int(wrong[0]), "a matrix that is no rotation", "orthonormal rows, determinant +1")
    return matrices


def _require_near_one(lengths: np.ndarray, what: str) -> None:
    wrong = np.flatnonzero(np.abs(lengths - 1) > _UNIT_TOLERANCE)
    if wrong.size:
        raise ConventionError(int(wrong[0]), f"{what} {lengths[wrong[0]]:.4g}", "length 1")


def _from_matrix(matrices: np.ndarray, kind: Rotation) -> np.ndarray:
    if kind == "matrix":
        return matrices.reshape(-1, 9)
    if kind == "6d":
        return np.concatenate([matrices[:, :, 0], matrices[:, :, 1]], axis=1)
    if kind == "rpy":
        pitch = np.arcsin(np.clip(-matrices[:, 2, 0], -1, 1))
        locked = np.abs(matrices[:, 2, 0]) > 1 - 1e-9  # gimbal lock: roll and yaw turn the same axis; yaw takes none
        roll = np.where(
            locked, np.arctan2(-matrices[:, 1, 2], matrices[:, 1, 1]), np.arctan2(matrices[:, 2, 1], matrices[:, 2, 2])
        )
        yaw = np.where(locked, 0.0, np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
        return np.stack([roll, pitch, yaw], axis=1)
    from scipy.spatial.transform import Rotation as Turn

    turn = Turn.from_matrix(matrices, assume_valid=True)  # _to_matrix has looked, with its own tolerance
    if kind == "axis-angle":
        return turn.as_rotvec()
    quaternions = turn.as_quat(scalar_first=kind == "quaternion-wxyz")
    w = quaternions[:, 0 if kind == "quaternion-wxyz" else 3]
    return quaternions * np.where(w < 0, -1.0, 1.0)[:, None]
