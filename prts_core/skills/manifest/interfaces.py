"""Say what a skill needs of a robot: which sensors it reads, which actuators it commands, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from prts_core.config.checks import Strict
from prts_core.skills.manifest.values import Count, NotEmpty

Modality = Literal[
    "rgb",
    "depth",
    "stereo",
    "ir",
    "point_cloud",
    "lidar_2d",
    "imu",
    "force_torque",
    "joint_state",
    "tactile_vision",
    "tactile_array",
    "audio",
    "gps",
    "battery",
]
ControlMode = Literal[
    "joint_position",
    "joint_velocity",
    "joint_torque",
    "joint_trajectory",
    "cartesian_pose",
    "cartesian_delta",
    "cartesian_twist",
    "body_twist",
    "foot_placement",
    "gripper_binary",
    "gripper_position",
    "dex_hand_joint",
    "composite_mode",
]
GRIPPER = ("gripper_binary", "gripper_position")
CARTESIAN = ("cartesian_pose", "cartesian_delta", "cartesian_twist")
JOINT = ("joint_position", "joint_velocity", "joint_torque")


@dataclass(frozen=True)
class SensorRequirement(Strict):
    """vla_feature_key: the one sensor of the robot that has this key; else `count` sensors of the modality. min_width,
    min_height: pixels."""

    modality: Modality
    vla_feature_key: str | None = None
    min_width: Count | None = None
    min_height: Count | None = None
    count: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class ControlModeSemantics(Strict):
    """mode: targets, or changes of the present state. gripper_convention: of gripper kinds only; reference_frame: of
    cartesian kinds only; both have to say it. joint_order: names, in the order of the action's numbers."""

    mode: Literal["absolute", "delta"]
    gripper_convention: (
        Literal[
            "normalized_open_unit", "normalized_open_symmetric", "binary_close_one", "raw_joint_rad", "width_meters"
        ]
        | None
    ) = None
    joint_order: tuple[str, ...] | None = None
    reference_frame: str | None = None


@dataclass(frozen=True)
class ActuatorRequirement(Strict):
    """kind: the control mode that the skill commands. n_dof, vla_action_key: where they are left out, the robot's."""

    kind: ControlMode
    control_mode_semantics: ControlModeSemantics
    n_dof: Count | None = None
    vla_action_key: str | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("gripper_convention", GRIPPER), ("reference_frame", CARTESIAN)):
            said = getattr(self.control_mode_semantics, name) is not None
            if said and self.kind not in kinds:
                raise ValueError(f"{name} belongs to {', '.join(kinds)}, not to {self.kind}")
            if not said and self.kind in kinds:
                raise ValueError(f"{self.kind} needs a {name} in control_mode_semantics")


@dataclass(frozen=True)
class EmbodimentExtra(Strict):
    """What a robot of the tag `custom` has: it stands in no robot description."""

    sensors: Annotated[tuple[SensorRequirement, ...], NotEmpty]
    actuators: Annotated[tuple[ActuatorRequirement, ...], NotEmpty]
