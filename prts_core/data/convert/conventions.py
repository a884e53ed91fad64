"""Numbers from one convention to another: rotations, grippers, units. Arrays in, arrays out.

It does not know files or mappings. Values that contradict the convention they are said to follow are refused.
"""

from __future__ import annotations

import numpy as np

from prts_core.data.convert.mapping import Gripper, Rotation

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
    if kind == "axis-angle":
        angle = np.linalg.norm(values, axis=1)
        axis = values / np.where(angle > 1e-12, angle, 1.0)[:, None]
        return _of_quaternion(np.concatenate([np.cos(angle / 2)[:, None], axis * np.sin(angle / 2)[:, None]], 1))
    if kind in ("quaternion-wxyz", "quaternion-xyzw"):
        wxyz = values if kind == "quaternion-wxyz" else values[:, [3, 0, 1, 2]]
        length = np.linalg.norm(wxyz, axis=1)
        _require_near_one(length, "a quaternion of length")
        return _of_quaternion(wxyz / length[:, None])
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
        (cr, cp, cy), (sr, sp, sy) = np.cos(values).T, np.sin(values).T
        rows = [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
        return np.array(rows).transpose(2, 0, 1)
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


def _of_quaternion(wxyz: np.ndarray) -> np.ndarray:
    w, x, y, z = wxyz.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _from_matrix(matrices: np.ndarray, kind: Rotation) -> np.ndarray:
    if kind == "matrix":
        return matrices.reshape(-1, 9)
    if kind == "6d":
        return np.concatenate([matrices[:, :, 0], matrices[:, :, 1]], axis=1)
    if kind == "rpy":
        pitch = np.arcsin(np.clip(-matrices[:, 2, 0], -1, 1))
        locked = np.abs(matrices[:, 2, 0]) > 1 - 1e-9  # gimbal lock: roll and yaw turn the same axis; yaw takes none
        roll = np.where(
            locked,
            np.arctan2(-matrices[:, 1, 2], matrices[:, 1, 1]),
            np.arctan2(matrices[:, 2, 1], matrices[:, 2, 2]),
        )
        yaw = np.where(locked, 0.0, np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
        return np.stack([roll, pitch, yaw], axis=1)
    wxyz = _quaternion(matrices)
    if kind == "quaternion-wxyz":
        return wxyz
    if kind == "quaternion-xyzw":
        return wxyz[:, [1, 2, 3, 0]]
    sine = np.linalg.norm(wxyz[:, 1:], axis=1)
    angle = 2 * np.arctan2(sine, wxyz[:, 0])
    return wxyz[:, 1:] * np.where(sine > 1e-12, angle / np.where(sine > 1e-12, sine, 1.0), 2.0)[:, None]


def _quaternion(m: np.ndarray) -> np.ndarray:
    """(T, 4) w, x, y, z with w >= 0 of (T, 3, 3), by the largest of the four components (Shepperd 1978)."""
    trace = np.trace(m, axis1=1, axis2=2)
    diagonal = np.stack([m[:, 0, 0], m[:, 1, 1], m[:, 2, 2]], 1)
    squares = np.stack([1 + trace, *(1 + 2 * diagonal - trace[:, None]).T], 1)  # 4 w^2, 4 x^2, 4 y^2, 4 z^2
    wx, wy, wz = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    xy, xz, yz = m[:, 1, 0] + m[:, 0, 1], m[:, 0, 2] + m[:, 2, 0], m[:, 2, 1] + m[:, 1, 2]
    rows = np.array(
        [
            [squares[:, 0], wx, wy, wz],
            [wx, squares[:, 1], xy, xz],
            [wy, xy, squares[:, 2], yz],
            [wz, xz, yz, squares[:, 3]],
        ]
    )  # (component taken, 4, T): each row is 4 times that component times the quaternion
    taken = squares.argmax(1)
    out = rows[taken, :, np.arange(len(m))]
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out * np.where(out[:, :1] < 0, -1.0, 1.0)
