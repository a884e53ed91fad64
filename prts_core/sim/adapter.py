"""Between what a policy says its numbers mean and what a suite says: equal, converted by name, or refused.

What is converted is written down in `notes`, for the report; whatever is not one of the known differences stops the
program with all differences, field by field, before the first episode.

Known differences: the gripper's convention, the form of a rotation in the state, units of one kind, the order of
dimensions, the size of a picture of equal proportions; and a policy may look at less than the suite shows (fewer
dimensions of the state, fewer cameras). How a policy trains (relative dimensions, limits) and the words of its prompt
(camera labels) do not concern a suite: what it returns is in its robot's units.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from prts_core.config.mapping import Gripper, Rotation
from prts_core.contract import Contract, Dimension
from prts_core.data.convert.conventions import convert_gripper, convert_rotation, unit_factor
from prts_core.data.images import resize
from prts_core.io.errors import ContractError
from prts_core.policy.observation import STATE

# How the dimensions of one rotation are named, after a common beginning: hand_axis_angle_x, hand_quaternion_w, ...
ROTATION_NAMES: dict[str, tuple[str, ...]] = {
    "axis-angle": ("axis_angle_x", "axis_angle_y", "axis_angle_z"),
    "quaternion-wxyz": ("quaternion_w", "quaternion_x", "quaternion_y", "quaternion_z"),
    "quaternion-xyzw": ("quaternion_x", "quaternion_y", "quaternion_z", "quaternion_w"),
    "6d": tuple(f"rotation_6d_{index}" for index in range(6)),
    "rpy": ("roll", "pitch", "yaw"),
    "matrix": tuple(f"rotation_matrix_{row}{column}" for row in range(3) for column in range(3)),
}
assert set(ROTATION_NAMES) == set(get_args(Rotation))
_OPENS = re.compile(r"([+-]?\d+(?:\.\d+)?) opens?, ([+-]?\d+(?:\.\d+)?) close[sd]")
_CLOSED_FIRST = re.compile(r"([+-]?\d+(?:\.\d+)?) close[sd], ([+-]?\d+(?:\.\d+)?) opens?")
_PROPORTION = 0.01  # by which width over height may differ

Columns = Callable[[np.ndarray], np.ndarray]  # (N, n) -> (N,)


@dataclass(frozen=True)
class Adapter:
    """observation: the suite's -> the policy's. actions: the policy's chunk -> the suite's. notes: what is changed."""

    policy: Contract
    suite: Contract
    notes: tuple[str, ...]
    _state: tuple[Columns, ...] = field(repr=False)
    _action: tuple[Columns, ...] = field(repr=False)

    def observation(self, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"observation.state": (S,), camera: (H, W, 3) uint8} of the suite, as the policy knows it."""
        state = np.asarray(seen[STATE], np.float64)[None]
        out = {STATE: np.array([column(state)[0] for column in self._state], np.float32)}
        for camera in self.policy.cameras:
            out[camera.key] = resize(seen[camera.key][None], camera.height, camera.width)[0]
        return out

    def actions(self, chunk: np.ndarray) -> np.ndarray:
        """(K, A) of the policy -> (K, A) float32 of the suite. ContractError for another width."""
        chunk = np.asarray(chunk, np.float64)
        if chunk.ndim != 2 or chunk.shape[1] != len(self.policy.action):
            raise ContractError(
                "A policy's actions are not as wide as its contract says",
                field="action",
                found=chunk.shape,
                expected=f"(K, {len(self.policy.action)})",
            )
        return np.stack([column(chunk) for column in self._action], axis=1).astype(np.float32)


def adapt(
    policy: Contract, suite: Contract, *, policy_name: str = "the policy", suite_name: str = "the suite"
) -> Adapter:
    """The adapter of a policy to a suite. ContractError with every difference that is none of the known ones."""
    faults: list[tuple[str, Any, Any]] = []
    notes: list[str] = []
    for name in ("embodiment", "control_hz"):
        mine, theirs = getattr(policy, name), getattr(suite, name)
        if mine != theirs:
            faults.append((name, mine, theirs))
    state = _state_columns(policy, suite, faults, notes)
    action = _action_columns(policy, suite, faults, notes)
    _cameras(policy, suite, faults, notes)
    if faults:
        shown = "; ".join(
            f"{name}: {mine!r} in {policy_name}, {theirs!r} in {suite_name}" for name, mine, theirs in faults
        )
        raise ContractError(
            f"{policy_name} cannot act in {suite_name}: they disagree on what the numbers mean",
            field=faults[0][0],
            found=shown,
            expected="equal contracts, or other gripper convention, rotation form, units, order or picture size",
            cure="choose a suite of the policy's own robot, or convert its data with that robot's YAML and train again",
        )
    return Adapter(policy, suite, tuple(dict.fromkeys(notes)), tuple(state), tuple(action))


def _take(index: int, factor: float = 1.0) -> Columns:
    return lambda rows: rows[:, index] * factor


def _state_columns(policy: Contract, suite: Contract, faults: list, notes: list[str]) -> list[Columns]:
    """One function for each of the policy's dimensions, of the suite's whole state."""
    turned = _rotations(policy, suite, faults, notes)
    columns, places = [], {dim.name: i for i, dim in enumerate(suite.state)}
    for index, dim in enumerate(policy.state):
        if dim.name in turned:
            columns.append(turned[dim.name])
        elif dim.name in places:
            columns.append(_same(dim, suite.state[places[dim.name]], places[dim.name], "state", faults, notes))
        else:
            faults.append((f"state[{index}]", dim.name, "no dimension of this name"))
    if len(policy.state) < len(suite.state) and not turned:
        notes.append(f"the state is {len(policy.state)} of the suite's {len(suite.state)} dimensions")
    if [d.name for d in policy.state if d.name in places] != [d.name for d in suite.state if d in policy.state]:
        notes.append("the state's dimensions are in another order")
    return columns


def _same(wanted: Dimension, given: Dimension, place: int, what: str, faults: list, notes: list[str]) -> Columns:
    """The column of `given`, in the unit of `wanted`."""
    factor = unit_factor(given.unit, wanted.unit)
    if factor is None:
        faults.append((f"{what}.{wanted.name}.unit", wanted.unit, given.unit))
        return _take(place)
    if factor != 1.0:
        notes.append(f"{what} {wanted.name}: {given.unit} to {wanted.unit}")
    return _take(place, factor)


def _rotations(policy: Contract, suite: Contract, faults: list, notes: list[str]) -> dict[str, Columns]:
    """Of every rotation that both states hold, but in two forms: the policy's dimensions by name."""
    if policy.rotation == suite.rotation:
        return {}
    mine, theirs = ROTATION_NAMES.get(policy.rotation), ROTATION_NAMES.get(suite.rotation)
    named = {dim.name: index for index, dim in enumerate(suite.state)}
    found: dict[str, Columns] = {}
    if mine is not None and theirs is not None:
        wanted = {dim.name for dim in policy.state}
        for prefix in (name.removesuffix(theirs[0]) for name in named if name.endswith(theirs[0])):
            if all(prefix + end in named for end in theirs) and all(prefix + end in wanted for end in mine):
                places = [named[prefix + end] for end in theirs]
                for part, end in enumerate(mine):
                    found[prefix + end] = _turned(places, part, suite.rotation, policy.rotation)
    # A 3-wide action of one form cannot be told from the other; wider ones have other names and are refused there.
    angles = [dim.name for dim in policy.action if "rot" in dim.name]
    if not found or (angles and {policy.rotation, suite.rotation} <= {"axis-angle", "rpy"}):
        faults.append(("rotation", policy.rotation, suite.rotation))
        return {}
    notes.append(f"rotations of the state: {suite.rotation} to {policy.rotation}")
    return found


def _turned(places: list[int], part: int, source: Any, target: Any) -> Columns:
    return lambda rows: convert_rotation(rows[:, places], source, target)[:, part]


def _action_columns(policy: Contract, suite: Contract, faults: list, notes: list[str]) -> list[Columns]:
    """One function for each of the suite's dimensions, of the policy's action."""
    places = {dim.name: index for index, dim in enumerate(policy.action)}
    columns = []
    grips = _grippers(policy, suite, faults)
    for index, dim in enumerate(suite.action):
        if dim.name not in places:
            faults.append((f"action[{index}]", "no dimension of this name", dim.name))
            continue
        place = places[dim.name]
        if grips is not None and "gripper" in dim.name:
            columns.append(_gripped(place, *grips))
            notes.append(f"action {dim.name}: {policy.gripper!r} to {suite.gripper!r}")
        else:
            columns.append(_same(dim, policy.action[place], place, "action", faults, notes))
    surplus = [dim.name for dim in policy.action if dim.name not in {d.name for d in suite.action}]
    faults += [(f"action.{name}", name, "no dimension of this name") for name in surplus]
    if not surplus and [d.name for d in policy.action] != [d.name for d in suite.action]:
        notes.append("the action's dimensions are in another order")
    return columns


def _grippers(policy: Contract, suite: Contract, faults: list) -> tuple[Gripper, Gripper] | None:
    """Both conventions where they differ; None where they do not."""
    if policy.gripper == suite.gripper:
        return None
    mine, theirs = read_gripper(policy.gripper), read_gripper(suite.gripper)
    if mine is None or theirs is None or not any("gripper" in dim.name for dim in suite.action):
        faults.append(("gripper", policy.gripper, suite.gripper))
        return None
    return None if mine == theirs else (mine, theirs)


def _gripped(place: int, source: Gripper, target: Gripper) -> Columns:
    low, high = sorted((source.open, source.closed))
    return lambda rows: convert_gripper(np.clip(rows[:, place : place + 1], low, high), source, target)[:, 0]


def read_gripper(text: str) -> Gripper | None:
    """The convention in words, "-1 opens, +1 closes" or "0 closed, 1 open"; None for any other sentence."""
    for pattern, order in ((_OPENS, ("open", "closed")), (_CLOSED_FIRST, ("closed", "open"))):
        if (match := pattern.fullmatch(text.strip())) is not None:
            values = {name: float(number) for name, number in zip(order, match.groups(), strict=True)}
            return None if values["open"] == values["closed"] else Gripper(**values)
    return None


def _cameras(policy: Contract, suite: Contract, faults: list, notes: list[str]) -> None:
    given = {camera.key: camera for camera in suite.cameras}
    for camera in policy.cameras:
        other = given.get(camera.key)
        if other is None:
            faults.append((f"cameras.{camera.key}", camera.key, ", ".join(given) or "no cameras"))
            continue
        mine, theirs = camera.width / camera.height, other.width / other.height
        if abs(mine / theirs - 1) > _PROPORTION:
            sizes = [f"{c.height} x {c.width}" for c in (camera, other)]
            faults.append((f"cameras.{camera.key}.size", *sizes))
        elif (camera.height, camera.width) != (other.height, other.width):
            sizes = [f"{c.height} x {c.width}" for c in (other, camera)]
            notes.append(f"camera {camera.key}: {sizes[0]} to {sizes[1]}")
    unseen = [key for key in given if key not in {camera.key for camera in policy.cameras}]
    if unseen:
        notes.append(f"the policy does not look at {', '.join(unseen)}")
