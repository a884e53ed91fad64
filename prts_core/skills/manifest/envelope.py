"""Bound what a robot may do: limits of a robot, and those of a skill, which may only be tighter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prts_core.config.checks import Lenient

Point = tuple[float, float, float]
# A limit that a file does not give is None; null in the file is refused, as the schema does where it has a default.
UNSAID: Any = None


@dataclass(frozen=True)
class SafetyEnvelope(Lenient):
    """Limits in SI units; None where the file does not say (the reference then takes a default of its own, which is no
    statement about this robot or skill). Keys that the schema does not have are ignored here, as it does."""

    workspace_box_min_xyz: Point | None = None
    workspace_box_max_xyz: Point | None = None
    no_go_zones: tuple[dict[str, Any], ...] = UNSAID
    max_ee_speed_m_s: float = UNSAID
    max_ee_accel_m_s2: float = UNSAID
    max_joint_speed_factor: float = UNSAID
    max_force_n: float = UNSAID
    max_torque_nm: float = UNSAID
    deadman_required: bool = UNSAID
    e_stop_topic: str = UNSAID
    e_stop_qos: Literal["reliable"] = UNSAID
    contact_force_threshold_n: float = UNSAID
    cycle_time_violation_threshold_ms: float = UNSAID
    human_in_loop_required: tuple[str, ...] = UNSAID
    max_cartesian_step_m: float | None = None
    max_cartesian_step_rad: float | None = None
    max_ee_angular_speed_rad_s: float | None = None
    max_base_linear_speed_m_s: float | None = None
    max_base_angular_speed_rad_s: float | None = None


UPPER_BOUNDS = tuple(
    name
    for name in SafetyEnvelope.__dataclass_fields__
    if name.startswith("max_") or name == "contact_force_threshold_n"
)


def looser(skill: SafetyEnvelope, robot: SafetyEnvelope) -> Iterator[str]:
    """What of a skill's limits is looser than the robot's, a sentence each. A limit that either leaves out is the
    other's."""
    for name in UPPER_BOUNDS:
        mine, its = getattr(skill, name), getattr(robot, name)
        if mine is not None and its is not None and mine > its:
            yield f"{name} {mine:g} is above the robot's {its:g}"
    for name, sign in (("workspace_box_min_xyz", -1), ("workspace_box_max_xyz", 1)):
        mine, its = getattr(skill, name), getattr(robot, name)
        if mine is not None and its is not None and any(sign * (a - b) > 0 for a, b in zip(mine, its, strict=True)):
            yield f"{name} {list(mine)} reaches beyond the robot's {list(its)}"
    if skill.deadman_required is False and robot.deadman_required:
        yield "deadman_required is false, and the robot asks for one"
