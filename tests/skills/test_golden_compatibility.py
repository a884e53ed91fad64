"""Skills on robots: every pair of the matrix and every variation comes out as the reference's, but where that is wrong.

What the reference gets wrong, and why ours is right, stands in `corrected`; everything else must be equal.
"""

from __future__ import annotations

from typing import Any

import pytest

from prts_core.skills.compatibility import CHECKS, OURS, compatibility
from prts_core.skills.manifest import check_manifest, read_manifest
from prts_core.skills.robot import Robot, check_robot, read_robot
from tests.skills.golden_skills import DATA, changed, needs_data, plain, verdicts

pytestmark = needs_data
MATRIX = verdicts("compat_matrix.json") or {}
VARIANTS = verdicts("compat_variants.json")


def corrected(reference: list[str], skill: dict[str, Any], robot: dict[str, Any]) -> list[str]:
    """The checks that have to fail, given those of the reference and both files as plain data.

    - `false` asks the reference for true; here it asks for false. A robot with two arms is none with one.
    - The reference compares no text; here a text is the robot's own, or one of its list. "heavy" is no number of kg.
    - It looks at no actuator; here the robot must take every control mode that is commanded.
    - It looks at no memory; here the memory of the dtype that is loaded must be there.
    """
    has, expected = robot["capabilities"], list(reference)
    wanted = skill.get("capabilities_required") or {}
    misjudged = {flag: value for flag, value in wanted.items() if value is False or isinstance(value, str)}
    if misjudged:
        assert misjudged.keys() == wanted.keys(), "a case of both sorts says nothing of either"
        met = [value in has[k] if isinstance(has[k], list) else value == has[k] for k, value in misjudged.items()]
        expected = [name for name in expected if name != "capability"]
        if not all(met):
            expected = [name for name in CHECKS if name in (*expected, "capability")]
    if {actuator["kind"] for actuator in skill["actuators_required"]} - set(has["supported_control_modes"]):
        expected.append("actuators")
    computer = robot.get("compute_edge") or robot.get("compute_local") or {}
    needs = (skill.get("min_vram_gb") or {}).get(skill["quantization"].get("dtype", "fp32"), 0)
    return [*expected, "memory"] if needs > computer.get("gpu_vram_gb", needs) else expected


def robots() -> dict[str, Robot]:
    return {path.stem: read_robot(path) for path in sorted((DATA / "robots").glob("*.yaml"))}


def test_the_checks_stand_in_the_order_of_the_reference():
    assert list(CHECKS)[:5] == ["embodiment", "capability", "runtime", "dtype", "sensors"] and set(OURS) < set(CHECKS)


@pytest.mark.parametrize("name", MATRIX)
def test_a_package_fits_the_robots_that_the_reference_says(name: str):
    skill, row = read_manifest(DATA / "manifests" / name), MATRIX[name]
    for robot, description in robots().items():
        failed = compatibility(skill, description).failed
        assert [check for check in failed if check not in OURS] == row[robot], robot


def test_what_ours_finds_beside_it():
    """One published pair passes the reference and cannot work: it commands a pose and a gripper, the robot joints."""
    wrong = {
        (name, robot): found.failed
        for name, row in MATRIX.items()
        for robot, description in robots().items()
        if not row[robot] and not (found := compatibility(read_manifest(DATA / "manifests" / name), description)).ok
    }
    assert wrong == {("3d-diffuser-actor-rlbench", "franka_panda"): ("actuators",)}


@pytest.mark.parametrize("case", VARIANTS, ids=[case["note"] for case in VARIANTS])
def test_a_variation_fails_the_checks_of_the_reference(case: dict):
    skill = changed(
        plain(DATA / "manifests" / case["manifest"] / "rskill.yaml"), case["manifest_set"], case["manifest_delete"]
    )
    robot = changed(plain(DATA / "robots" / f"{case['robot']}.yaml"), case["robot_set"], case["robot_delete"])
    found = compatibility(check_manifest(skill, "a variation"), check_robot(robot, "a variation"))
    assert list(found.failed) == corrected(case["failed_checks"], skill, robot), found


def test_what_the_reference_gets_wrong_is_among_the_cases():
    wrong = set()
    for case in VARIANTS:
        asked = case["manifest_set"].get("capabilities_required", {}).items()
        wrong |= {f"{flag}: {value}" for flag, value in asked if value is False or isinstance(value, str)}
    assert wrong >= {"bimanual: False", "has_vision: False", "has_vision: yes", "can_lift_kg: heavy"}


def test_the_memory_that_the_reference_does_not_look_at():
    """Its variation states the memory of another dtype than the one that is loaded; of that one, ours holds it."""
    case = next(case for case in VARIANTS if "VRAM" in case["note"])
    skill = plain(DATA / "manifests" / case["manifest"] / "rskill.yaml")
    robot = check_robot(changed(plain(DATA / "robots" / f"{case['robot']}.yaml"), case["robot_set"], []), "a variation")
    stated = case["manifest_set"]["min_vram_gb"]
    for dtype, expected in ((next(iter(stated)), ("memory",)), (skill["quantization"]["dtype"], ())):
        loaded = skill | {"min_vram_gb": stated, "quantization": {"dtype": dtype}}
        assert compatibility(check_manifest(loaded, "a variation"), robot).failed == expected
