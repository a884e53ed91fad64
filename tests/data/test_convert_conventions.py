"""Rotations, grippers and units between conventions: against known values, there and back, and what is refused."""

from __future__ import annotations

import itertools
import typing

import numpy as np
import pytest

from prts_core.config.mapping import Gripper, Rotation
from prts_core.data.convert.conventions import (
    ROTATION_WIDTH,
    ConventionError,
    convert_gripper,
    convert_rotation,
    unit_factor,
)

HALF = np.sqrt(0.5)
# A quarter turn about x, about y, about z; half a turn about x; none.
TURNS: dict[Rotation, list[list[float]]] = {
    "axis-angle": [[np.pi / 2, 0, 0], [0, np.pi / 2, 0], [0, 0, np.pi / 2], [np.pi, 0, 0], [0, 0, 0]],
    "quaternion-wxyz": [[HALF, HALF, 0, 0], [HALF, 0, HALF, 0], [HALF, 0, 0, HALF], [0, 1, 0, 0], [1, 0, 0, 0]],
    "quaternion-xyzw": [[HALF, 0, 0, HALF], [0, HALF, 0, HALF], [0, 0, HALF, HALF], [1, 0, 0, 0], [0, 0, 0, 1]],
    "matrix": [
        [1, 0, 0, 0, 0, -1, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, -1, 0, 0],
        [0, -1, 0, 1, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, -1, 0, 0, 0, -1],
        [1, 0, 0, 0, 1, 0, 0, 0, 1],
    ],
    "6d": [[1, 0, 0, 0, 0, 1], [0, 0, -1, 0, 1, 0], [0, 1, 0, -1, 0, 0], [1, 0, 0, 0, -1, 0], [1, 0, 0, 0, 1, 0]],
    "rpy": [[np.pi / 2, 0, 0], [0, np.pi / 2, 0], [0, 0, np.pi / 2], [np.pi, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize(("source", "target"), itertools.permutations(TURNS, 2))
def test_known_turns(source: Rotation, target: Rotation) -> None:
    made = convert_rotation(np.array(TURNS[source], float), source, target)
    assert np.allclose(made, TURNS[target], atol=1e-9)


def test_every_convention_is_tried() -> None:
    assert set(TURNS) == set(typing.get_args(Rotation)) == set(ROTATION_WIDTH)


def random_turns(count: int = 500) -> np.ndarray:
    wxyz = np.random.default_rng(3).normal(size=(count, 4))
    wxyz[:50, 1:] *= 1e-9  # tiny angles
    wxyz[50:100, 0] *= 1e-9  # nearly half turns
    return wxyz / np.linalg.norm(wxyz, axis=1, keepdims=True)


@pytest.mark.parametrize("through", ["axis-angle", "6d", "rpy", "matrix", "quaternion-xyzw"])
def test_there_and_back(through: Rotation) -> None:
    wxyz = random_turns()
    back = convert_rotation(convert_rotation(wxyz, "quaternion-wxyz", through), through, "quaternion-wxyz")
    # q and -q are one rotation; rpy near its poles loses some digits
    assert np.abs((back * wxyz).sum(1)).min() > 1 - 1e-9
    if through == "axis-angle":
        angles = np.linalg.norm(convert_rotation(wxyz, "quaternion-wxyz", through), axis=1)
        assert angles.max() <= np.pi + 1e-12


def test_columns_are_told_from_rows() -> None:
    """6d holds columns of the matrix (Zhou et al. 2019): a turn and its inverse must not be exchanged."""
    made = convert_rotation(np.array([[0.0, 0.0, 0.3]]), "axis-angle", "6d")[0]
    assert np.allclose(made[:3], [np.cos(0.3), np.sin(0.3), 0]) and made[3] < 0


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ([[1, 0, 0, 0], [0.9, 0, 0, 0]], "quaternion-wxyz", "row 1.*length 0.9"),
        ([[0, 0, 0, 0, 0, 0]], "6d", "row 0.*length 0"),
        ([[1, 0, 0, 2, 0, 0]], "6d", "parallel"),
        ([[1, 0, 0, 0, 1, 0, 0, 0, -1]], "matrix", "no rotation"),
        ([[2, 0, 0, 0, 2, 0, 0, 0, 2]], "matrix", "no rotation"),
    ],
)
def test_numbers_that_are_no_rotation(values: list, kind: Rotation, words: str) -> None:
    with pytest.raises(ConventionError, match=words):
        convert_rotation(np.array(values, float), kind, "axis-angle")


def test_grippers() -> None:
    source, target = Gripper(open=0.08, closed=0.0), Gripper(open=-1, closed=1)
    made = convert_gripper(np.array([[0.08], [0.0], [0.04]]), source, target)
    assert np.allclose(made, [[-1], [1], [0]])
    assert (str(target), str(Gripper(1, 0))) == ("-1 opens, +1 closes", "+1 opens, 0 closes")
    with pytest.raises(ConventionError, match=r"row 2: 0\.2, not 0 to 0\.08"):
        convert_gripper(np.array([[0.08], [0.0], [0.2]]), source, target)


def test_units() -> None:
    assert unit_factor("mm", "m") == 1e-3 and unit_factor("deg", "rad") == np.pi / 180
    assert unit_factor("furlong", "furlong") == 1.0 and unit_factor("mm", "rad") is None
