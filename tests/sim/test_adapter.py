"""Contracts of policy and suite: what is equal passes, what is known is converted, everything else is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prts_core.contract import Camera, Contract, Dimension
from prts_core.data.convert.conventions import convert_rotation
from prts_core.io.errors import ContractError
from prts_core.policy.observation import STATE
from prts_core.sim.adapter import ROTATION_NAMES, adapt, read_gripper
from prts_core.sim.suites.libero.spec import contract

SUITE = contract()
HAND = SUITE.state[:3]
FINGERS = SUITE.state[6:]


def policy(**changes: Any) -> Contract:
    return replace(SUITE, **changes)


def rotated(form: str) -> tuple[Dimension, ...]:
    return (*HAND, *(Dimension(f"hand_{end}", "rad") for end in ROTATION_NAMES[form]), *FINGERS)


@pytest.fixture
def seen() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pictures = {camera.key: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for camera in SUITE.cameras}
    return {STATE: np.array([-0.2, 0.01, 0.9, 3.1, 0.2, -0.3, 0.04, -0.04], np.float32), **pictures}


def test_equal_contracts_pass_and_nothing_is_changed(seen: dict[str, np.ndarray]):
    adapter = adapt(policy(), SUITE)
    assert adapter.notes == ()
    out = adapter.observation(seen)
    assert set(out) == set(seen) and all(np.array_equal(out[key], seen[key]) for key in seen)
    chunk = np.random.default_rng(1).uniform(-1, 1, (8, 7)).astype(np.float32)
    assert np.array_equal(adapter.actions(chunk), chunk) and adapter.actions(chunk).dtype == np.float32


def test_how_it_trains_and_what_its_prompt_says_are_its_own_business():
    action = tuple(replace(dim, relative=index < 6) for index, dim in enumerate(SUITE.action))
    cameras = tuple(replace(camera, label="Some words") for camera in SUITE.cameras)
    assert adapt(policy(action=action, cameras=cameras), SUITE).notes == ()


@pytest.mark.parametrize(
    ("convention", "opened", "closed"),
    [("+1 opens, 0 closes", 1.0, 0.0), ("+1 opens, -1 closes", 1.0, -1.0), ("0 closed, 1 open", 1.0, 0.0)],
)
def test_a_gripper_convention_is_converted(convention: str, opened: float, closed: float):
    adapter = adapt(policy(gripper=convention), SUITE)
    half, beyond = (opened + closed) / 2, opened + (opened - closed)
    chunk = np.zeros((4, 7))
    chunk[:, 0], chunk[:, 6] = 0.5, (opened, closed, half, beyond)
    out = adapter.actions(chunk)
    assert out[:, 6].tolist() == [-1, 1, 0, -1] and (out[:, 0] == 0.5).all()
    assert convention in adapter.notes[0]


@pytest.mark.parametrize("form", [form for form in ROTATION_NAMES if form not in ("axis-angle", "rpy")])
def test_a_rotation_of_the_state_is_converted(form: str, seen: dict[str, np.ndarray]):
    out = adapt(policy(state=rotated(form), rotation=form), SUITE).observation(seen)[STATE]
    assert out.shape == (5 + len(ROTATION_NAMES[form]),)
    back = convert_rotation(out[None, 3:-2].astype(float), form, "matrix")  # type: ignore[arg-type]
    assert np.allclose(back, convert_rotation(seen[STATE][None, 3:6].astype(float), "axis-angle", "matrix"), atol=1e-5)
    assert np.array_equal(out[:3], seen[STATE][:3]) and np.array_equal(out[-2:], seen[STATE][-2:])


def test_roll_pitch_yaw_is_refused_where_the_action_turns_too():
    """Three numbers of either form look alike; nothing says which the policy's action holds."""
    with pytest.raises(ContractError, match="'rpy' in the policy, 'axis-angle' in the suite"):
        adapt(policy(state=rotated("rpy"), rotation="rpy"), SUITE)


def test_order_and_units_are_found_by_name(seen: dict[str, np.ndarray]):
    state = tuple(Dimension(dim.name, "mm") if dim.name == "hand_z" else dim for dim in reversed(SUITE.state))
    adapter = adapt(policy(state=state, action=SUITE.action[::-1]), SUITE)
    out = adapter.observation(seen)[STATE]
    assert out[5] == pytest.approx(900) and np.array_equal(
        out[[0, 1, 2, 3, 4, 6, 7]], seen[STATE][::-1][[0, 1, 2, 3, 4, 6, 7]]
    )
    chunk = np.random.default_rng(1).uniform(-1, 1, (3, 7)).astype(np.float32)
    assert np.array_equal(adapter.actions(chunk), chunk[:, ::-1])
    assert {"the state's dimensions are in another order", "the action's dimensions are in another order"} <= set(
        adapter.notes
    )


def test_pictures_are_brought_to_the_policys_size_and_unseen_cameras_are_said(seen: dict[str, np.ndarray]):
    camera = SUITE.cameras[0]
    adapter = adapt(policy(cameras=(replace(camera, height=224, width=224),), state=HAND), SUITE)
    out = adapter.observation(seen)
    assert out[camera.key].shape == (224, 224, 3) and out[camera.key].dtype == np.uint8
    assert SUITE.cameras[1].key not in out and out[STATE].tolist() == seen[STATE][:3].tolist()
    assert any("224 x 224" in note for note in adapter.notes) and any("wrist_image" in note for note in adapter.notes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"embodiment": "widowx"}, "embodiment"),
        ({"control_hz": 10.0}, "control_hz"),
        ({"gripper": "unknown"}, "gripper"),
        ({"gripper": "0 closed, 1 open, per finger"}, "gripper"),
        ({"rotation": "unknown"}, "rotation"),
        ({"rotation": "quaternion-wxyz"}, "rotation"),  # but its state is named as axis-angle
        ({"state": (*SUITE.state, Dimension("elbow", "rad"))}, r"state\[8\]"),
        ({"state": (replace(SUITE.state[0], unit="rad"), *SUITE.state[1:])}, r"state\.hand_x\.unit"),
        ({"state": tuple(Dimension(f"state_{i}") for i in range(8))}, r"state\[0\]"),
        ({"action": SUITE.action[:6]}, r"action\[6\]"),
        ({"action": (*SUITE.action, Dimension("base", "1"))}, r"action\.base"),
        ({"cameras": (Camera("observation.images.top", "Top", 256, 256),)}, "cameras.observation.images.top"),
        ({"cameras": (replace(SUITE.cameras[0], width=320),)}, "size"),
    ],
)
def test_everything_else_is_refused_with_the_field(changes: dict[str, Any], field: str):
    with pytest.raises(ContractError, match=field):
        adapt(policy(**changes), SUITE)


def test_all_differences_are_told_at_once():
    with pytest.raises(ContractError) as err:
        adapt(
            policy(embodiment="widowx", control_hz=5.0, gripper="by hand"),
            SUITE,
            policy_name="mine",
            suite_name="theirs",
        )
    assert all(word in str(err.value) for word in ("'widowx' in mine", "5.0 in mine, 20.0 in theirs", "by hand"))


def test_actions_of_another_width_are_refused():
    with pytest.raises(ContractError, match=r"\(K, 7\)"):
        adapt(policy(), SUITE).actions(np.zeros((3, 6)))


def test_gripper_conventions_are_read_and_no_sentence_is_guessed():
    made = read_gripper("-1 opens, +1 closes")
    assert made is not None and (made.open, made.closed) == (-1, 1)
    made = read_gripper("0 closed, 1 open")
    assert made is not None and (made.open, made.closed) == (1, 0)
    assert read_gripper("unknown") is read_gripper("1 opens, 1 closes") is read_gripper("") is None
