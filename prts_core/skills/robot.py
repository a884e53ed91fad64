"""Read a robot description (the public schema "0.2") as far as skills are held against it.

Everything else in the file (meshes, collision geometry, drivers) is passed over, as the schema passes over what it does
not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.checks import Lenient
from prts_core.skills.manifest.envelope import SafetyEnvelope
from prts_core.skills.manifest.interfaces import ControlMode, Modality
from prts_core.skills.manifest.resources import Dtype, Runtime

CURE = "correct what is named above; docs/how-to/skills.md says what a robot description needs"


@dataclass(frozen=True)
class Joint(Lenient):
    """role: what the joint is part of; "unknown" where nobody said."""

    name: str
    joint_type: Literal["revolute", "prismatic", "continuous", "fixed", "floating", "planar"]
    parent_link: str
    child_link: str
    position_limits: tuple[float, float] | None = None
    role: Literal["arm", "base", "gripper", "torso", "leg", "head", "neck", "wheel", "unknown"] = "unknown"


@dataclass(frozen=True)
class EndEffector(Lenient):
    name: str
    kind: Literal["parallel_gripper", "suction", "dexterous_hand", "tool", "none"]
    n_dof: int = 1


@dataclass(frozen=True)
class Intrinsics(Lenient):
    """Of a pinhole camera, in pixels."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class Sensor(Lenient):
    """vla_feature_key: the key of a policy's batch that this sensor fills."""

    name: str
    modality: Modality
    frame_id: str
    rate_hz: float
    intrinsics: Intrinsics | None = None
    vla_feature_key: str | None = None
    encoding: str | None = None


@dataclass(frozen=True)
class Capabilities(Lenient):
    """Flags that a skill may ask for by name; a camera is there unless the file says otherwise."""

    locomotion: tuple[Literal["bipedal", "quadruped", "wheeled", "tracked", "none"], ...] = ()
    can_lift_kg: float = 0.0
    has_dexterous_hands: bool = False
    has_tactile: bool = False
    has_force_control: bool = False
    has_vision: bool = True
    has_lidar: bool = False
    has_vision_slam: bool = False
    has_audio: bool = False
    bimanual: bool = False
    supported_control_modes: tuple[ControlMode, ...] = ()
    supported_vla_embodiments: tuple[str, ...] = ()
    embodiment_tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compute(Lenient):
    """One computer of the robot. An empty list says nothing; gpu_vram_gb none: not said."""

    gpu_supported_runtimes: tuple[Runtime, ...] = ()
    gpu_supported_dtypes: tuple[Dtype, ...] = ()
    gpu_vram_gb: float | None = None
    compute_tops: float | None = None


@dataclass(frozen=True)
class SimGripper(Lenient):
    joint: str


@dataclass(frozen=True)
class Simulation(Lenient):
    grippers: tuple[SimGripper, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Robot(Lenient):
    """A robot description. compute_edge is on the robot, compute_local beside it, compute_cloud elsewhere."""

    name: str
    embodiment_kind: Literal[
        "humanoid", "manipulator", "bimanual", "quadruped", "mobile_base", "mobile_manipulator", "drone"
    ]
    joints: tuple[Joint, ...]
    capabilities: Capabilities
    safety: SafetyEnvelope
    schema_version: Literal["0.2"] = "0.2"
    end_effectors: tuple[EndEffector, ...] = ()
    sensors: tuple[Sensor, ...] = ()
    compute_edge: Compute | None = None
    compute_local: Compute | None = None
    compute_cloud: Compute | None = None
    base_joints: tuple[str, ...] | None = None
    footprint_polygon: tuple[tuple[float, float], ...] | None = None
    sim: Simulation = field(default_factory=Simulation)

    @property
    def compute(self) -> Compute | None:
        """Where a skill runs: the edge computer, else the local one. One that says nothing still hides the other."""
        return self.compute_edge or self.compute_local

    @property
    def joint_names(self) -> frozenset[str]:
        return frozenset(joint.name for joint in self.joints)

    def __post_init__(self) -> None:
        if faults := [*self._faults()]:
            raise ValueError("; ".join(faults))

    def _faults(self) -> Iterator[str]:
        grippers = Counter(gripper.joint for gripper in self.sim.grippers)
        for name, joints in (("base_joints", self.base_joints or ()), ("sim.grippers", tuple(grippers))):
            if stray := sorted(set(joints) - self.joint_names):
                yield f"{name} names joints that the robot does not have: {', '.join(stray)}"
        if self.base_joints is not None and len(self.base_joints) < 3:
            yield f"base_joints are {len(self.base_joints)}: a planar base has at least 3"
        if double := [joint for joint, count in grippers.items() if count > 1]:
            yield f"sim.grippers names a joint twice: {', '.join(double)}"
        corners = self.footprint_polygon
        if corners is not None and (len(corners) < 3 or not all(isfinite(x) for corner in corners for x in corner)):
            yield "footprint_polygon needs at least 3 corners, all finite"


def read_robot(path: Path) -> Robot:
    """A robot description; ConfigError with every fault of the file."""
    return check_robot(read_yaml(path, "robot description"), path)


def check_robot(raw: dict[str, Any], where: object) -> Robot:
    """The same of plain data that came from `where`."""
    return check(Robot, raw, where, what="robot description", cure=CURE)
