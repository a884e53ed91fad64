"""Say what the numbers of a checkpoint's state and action vectors are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from prts_core.config.checks import Lenient, Strict
from prts_core.skills.manifest.interfaces import CARTESIAN, GRIPPER, JOINT, ControlMode
from prts_core.skills.manifest.values import Count

StateLayout = Literal["smolvla_9d", "human300_16d", "gr1", "rc365", "simpler_widowx", "simpler_google", "libero_eef8d"]
BOUND_LAYOUTS = {
    "human300_16d": ("eef_frame", "base_frame"),
    "rc365": ("eef_frame", "base_frame"),
    "libero_eef8d": ("eef_frame", "gripper_qpos_joints"),
}
"""Layouts that are put together from frames and joints of the robot, and the bindings that they cannot do without. Any
other layout is read from joints alone and takes no bindings."""

Representation = Literal[
    "joint_positions",
    "joint_velocities",
    "delta_ee_6d_plus_gripper",
    "delta_ee_6d",
    "delta_ee_3d_plus_gripper",
    "cartesian_pose",
]
SLOT_TARGETS = {
    **dict.fromkeys(JOINT, ((), ("joint_names",))),
    **dict.fromkeys(CARTESIAN, (("ee", "frame"), ())),
    "body_twist": (("frame",), ()),
    **dict.fromkeys(GRIPPER, (("ee",), ())),
    "composite_mode": ((), ()),
}
"""Of each control mode, which of ee, frame and joint_names its slots must name, and which they may. Modes that are not
here (foot_placement, dex_hand_joint, joint_trajectory) may name any or none."""


@dataclass(frozen=True)
class Bindings(Lenient):
    """Where the numbers of a layout come from on this robot: frames by name, joints in the layout's order. Keys that
    the schema does not have are ignored here, as it does."""

    eef_frame: str | None = None
    base_frame: str | None = None
    world_frame: str | None = "map"
    gripper_qpos_joints: tuple[str, ...] = ()
    quaternion_convention: Literal["xyzw", "wxyz"] = "xyzw"


@dataclass(frozen=True)
class StateContract(Strict):
    """The state vector: a layout of a known name, or `dim` numbers as the robot gives them."""

    layout: StateLayout | None = None
    dim: Count | None = None
    bindings: Bindings | None = None

    def __post_init__(self) -> None:
        needed = BOUND_LAYOUTS.get(self.layout or "")
        if needed is None:
            if self.bindings is not None:
                raise ValueError(f"bindings belong to the layouts {', '.join(BOUND_LAYOUTS)}, not to {self.layout}")
            return
        missing = [name for name in needed if not getattr(self.bindings, name, None)]
        if missing:
            raise ValueError(f"layout {self.layout} needs bindings with {' and '.join(missing)}")


@dataclass(frozen=True)
class ActionSlot(Strict):
    """Numbers `range[0]` to `range[1]`, both inclusive, of an action: which control mode they command, or that they are
    dropped. ee: the robot's end effector or gripper joint; frame: what they are expressed in; joint_names: one a
    number, none meaning all joints in the robot's order."""

    range: tuple[int, int]
    control_mode: ControlMode | None = None
    discard: bool = False
    ee: str | None = None
    frame: str | None = None
    joint_names: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.range[1] - self.range[0] + 1

    def __post_init__(self) -> None:
        if not 0 <= self.range[0] <= self.range[1]:
            raise ValueError(f"range {list(self.range)} is not [first, last] with 0 <= first <= last")
        named = [name for name in ("ee", "frame", "joint_names") if getattr(self, name)]
        if self.discard or self.control_mode is None:
            if not self.discard:
                raise ValueError("say a control_mode, or discard: true")
            if self.control_mode is not None or named:
                raise ValueError(f"a slot that is discarded has no {', '.join(['control_mode', *named])}")
            return
        if self.control_mode not in SLOT_TARGETS:
            return
        needed, allowed = SLOT_TARGETS[self.control_mode]
        missing = [name for name in needed if not getattr(self, name)]
        stray = [name for name in named if name not in needed + allowed]
        if missing or stray:
            raise ValueError(
                f"a slot of {self.control_mode} needs {' and '.join(needed) or 'no target'}"
                + "".join(f"; {name} is missing" for name in missing)
                + "".join(f"; {name} does not belong here" for name in stray)
            )
        if self.joint_names and len(self.joint_names) != self.width:
            raise ValueError(f"{len(self.joint_names)} joint_names for {self.width} numbers")
        if self.control_mode == "composite_mode" and self.width != 1:
            raise ValueError(f"composite_mode is one number, not {self.width}")


@dataclass(frozen=True)
class ActionContract(Strict):
    """The action vector: `dim` numbers, of a known representation or cut into slots that cover each number once."""

    dim: Count
    representation: Representation | None = None
    slots: tuple[ActionSlot, ...] | None = None

    def __post_init__(self) -> None:
        if self.slots is None:
            return
        covered = Counter(index for slot in self.slots for index in range(slot.range[0], min(slot.range[1], 2**16) + 1))
        outside = [index for index in covered if index >= self.dim]
        missing = [index for index in range(min(self.dim, 2**16)) if index not in covered]
        double = [index for index, count in covered.items() if count > 1 and index < self.dim]
        faults = (("no slot covers", missing), ("several slots cover", double), ("slots reach beyond dim to", outside))
        if not self.slots:
            raise ValueError("slots is an empty list; leave it out where there are none")
        if any(found for _, found in faults):
            raise ValueError(
                f"slots cover each of the {self.dim} numbers once: "
                + "; ".join(f"{what} {', '.join(map(str, found[:8]))}" for what, found in faults if found)
            )
