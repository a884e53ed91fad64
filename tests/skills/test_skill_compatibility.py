"""Skills on robots: what each check finds, and that a robot which has more fits no worse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError
from prts_core.skills.compatibility import CHECKS, compatibility
from prts_core.skills.robot import check_robot, read_robot
from tests.skills.made_packages import manifest, raw_robot, robot


def states(skill: dict[str, Any], arm: dict[str, Any]) -> dict[str, str]:
    found = compatibility(manifest(**skill), robot(**arm))
    assert all(bool(check.found) == (check.state != "passed") for check in found.checks)
    return {check.name: check.state for check in found.checks}


def test_a_pair_that_fits():
    assert states({}, {}) == dict.fromkeys(CHECKS, "passed")


def test_what_the_robot_does_not_say_stands_in_nobodys_way():
    capabilities = raw_robot()["capabilities"] | {"supported_control_modes": []}
    found = states({}, {"compute_edge": None, "capabilities": capabilities})
    unknown = ("runtime", "dtype", "actuators", "memory")
    assert found == {name: "unknown" if name in unknown else "passed" for name in CHECKS}
    assert states({"min_vram_gb": None}, {})["memory"] == "unknown"


@pytest.mark.parametrize(
    ("skill", "arm", "fails"),
    [
        ({"min_vram_gb": {"bf16": 8.01}}, {}, "memory"),
        ({"min_vram_gb": {"bf16": 0.1}}, {"compute_edge": {"gpu_vram_gb": 0}}, "memory"),
        ({"envelope": {"max_force_n": 20.5}}, {}, "envelope"),
        ({"envelope": {"deadman_required": False}}, {}, "envelope"),
        ({"envelope": {"workspace_box_min_xyz": [-1, -1.5, 0]}}, {}, "envelope"),
        (
            {"action_contract": {"dim": 1, "slots": [{"range": [0, 0], "control_mode": "composite_mode"}]}},
            {},
            "actuators",
        ),
        (
            {
                "action_contract": {
                    "dim": 1,
                    "slots": [{"range": [0, 0], "control_mode": "joint_position", "joint_names": ["elbow"]}],
                }
            },
            {},
            "actuators",
        ),
        (
            {
                "actuators_required": [
                    {"kind": "joint_position", "n_dof": 9, "control_mode_semantics": {"mode": "delta"}}
                ]
            },
            {},
            "actuators",
        ),
        ({"capabilities_required": {"locomotion": "wheeled"}}, {}, "capability"),
    ],
)
def test_what_the_reference_does_not_check(skill: dict, arm: dict, fails: str):
    found = states(skill, arm)
    assert [name for name, state in found.items() if state == "failed"] == [fails]


def test_limits_that_are_tighter_or_not_said_pass():
    tighter = {"max_force_n": 20.0, "workspace_box_min_xyz": [-1, 0, 0], "max_torque_nm": 99, "deadman_required": True}
    assert states({"envelope": tighter}, {})["envelope"] == "passed"
    assert states({"envelope": {}}, {})["envelope"] == "passed"


def test_a_text_may_be_one_of_a_list():
    capabilities = raw_robot()["capabilities"] | {"locomotion": ["wheeled"]}
    assert states(
        {"capabilities_required": {"locomotion": "wheeled"}}, {"capabilities": capabilities}
    ) == dict.fromkeys(CHECKS, "passed")


MORE = st.sampled_from(
    [
        ("capabilities", "embodiment_tags", "ur5e"),
        ("capabilities", "supported_control_modes", "cartesian_delta"),
        ("compute_edge", "gpu_supported_runtimes", "onnx"),
        ("compute_edge", "gpu_supported_dtypes", "fp32"),
        ("sensors", None, {"name": "x", "modality": "depth", "frame_id": "w", "rate_hz": 1}),
    ]
)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "embodiment_tags": st.lists(st.sampled_from(["any", "franka_panda", "ur5e", "g1"]), min_size=1),
        "runtime": st.sampled_from(["pytorch", "onnx", "jax"]),
        "quantization": st.fixed_dictionaries({"dtype": st.sampled_from(["bf16", "fp32", "int8"])}),
        "sensors_required": st.lists(
            st.fixed_dictionaries({"modality": st.sampled_from(["rgb", "depth"]), "count": st.integers(1, 2)}),
            max_size=2,
        ),
        "capabilities_required": st.dictionaries(
            st.sampled_from(["can_lift_kg", "bimanual", "has_vision", "no_flag"]), st.integers(0, 4) | st.booleans()
        ),
    },
)


@given(skill=ASKED, more=st.lists(MORE, max_size=4))
def test_a_robot_that_has_more_fits_no_worse(skill: dict[str, Any], more: list[tuple]):
    raw = raw_robot()
    before = set(compatibility(manifest(**skill), check_robot(raw, "a test")).failed)
    richer = copy.deepcopy(raw)
    for part, field, value in more:
        (richer[part] if field is None else richer[part][field]).append(value)
    assert set(compatibility(manifest(**skill), check_robot(richer, "a test")).failed) <= before


@given(skill=ASKED)
def test_a_skill_for_any_robot_fits_every_embodiment(skill: dict[str, Any]):
    found = compatibility(manifest(**skill | {"embodiment_tags": ["any"]}), robot(capabilities={}))
    assert "embodiment" not in found.failed


@given(flag=st.sampled_from(["bimanual", "has_vision", "has_lidar"]), has=st.booleans(), wanted=st.booleans())
def test_a_truth_value_asks_for_itself(flag: str, has: bool, wanted: bool):
    found = states({"capabilities_required": {flag: wanted}}, {"capabilities": {flag: has, "embodiment_tags": []}})
    assert (found["capability"] == "passed") == (has == wanted)


# ---- robot descriptions ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_joints": ["joint0", "joint1", "wheel"]}, "joints that the robot does not have: wheel"),
        ({"base_joints": ["joint0"]}, "at least 3"),
        ({"footprint_polygon": [[0, 0], [1, 1]]}, "at least 3 corners"),
        ({"sim": {"grippers": [{"joint": "joint1"}, {"joint": "joint1"}]}}, "names a joint twice: joint1"),
        ({"sim": {"grippers": [{"joint": "g"}]}}, "does not have: g"),
        ({"embodiment_kind": "robot"}, "embodiment_kind"),
        ({"schema_version": "0.1"}, "schema_version"),
    ],
)
def test_a_robot_that_is_not_sound(change: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        robot(**change)


def test_keys_of_others_are_passed_over():
    assert robot(hal={"sim": None}, assets={}) == robot()


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such robot description"):
        read_robot(tmp_path / "robot.yaml")
