"""Hold a skill against a robot: one check after the other, each with what it found.

The first five and their order are the public reference's. Where that one passes a wrong pair, ours does not: a
requirement of `false` asks for false, texts are compared, and three checks are ours: the control modes and targets that
the skill commands, GPU memory, and limits that are looser than the robot's. A check that the robot's description gives
no answer to is "unknown" and stands in nobody's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from prts_core.skills.manifest import Manifest
from prts_core.skills.manifest.envelope import looser
from prts_core.skills.manifest.identity import ANY
from prts_core.skills.manifest.interfaces import SensorRequirement
from prts_core.skills.robot import Robot, Sensor


@dataclass(frozen=True)
class Check:
    """One check. found: why it failed, or why nothing can be said, a sentence each."""

    name: str
    state: Literal["passed", "failed", "unknown"]
    found: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compatibility:
    """All checks of one skill on one robot, in order."""

    skill: str
    robot: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.state == "failed")

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


class _Unknown(Exception):
    """The robot's description does not say; with why."""


def compatibility(skill: Manifest, robot: Robot) -> Compatibility:
    """Run every check; none stops the others."""
    done = []
    for name, faults in CHECKS.items():
        try:
            found = tuple(faults(skill, robot))
            done.append(Check(name, "failed" if found else "passed", found))
        except _Unknown as err:
            done.append(Check(name, "unknown", (str(err),)))
    return Compatibility(skill.name, robot.name, tuple(done))


# ---- as the reference ----------------------------------------------------------------------------------------------
def _embodiment(skill: Manifest, robot: Robot) -> Iterator[str]:
    has = robot.capabilities.embodiment_tags
    if ANY not in skill.embodiment_tags and not set(skill.embodiment_tags) & set(has):
        yield f"made for {', '.join(skill.embodiment_tags)}; the robot is {', '.join(has) or 'untagged'}"


def _capability(skill: Manifest, robot: Robot) -> Iterator[str]:
    known = {f.name: getattr(robot.capabilities, f.name) for f in fields(robot.capabilities)}
    for flag, wanted in skill.capabilities_required.items():
        if flag not in known:
            yield f"{flag}: no robot has such a flag"
        elif not _meets(wanted, known[flag]):
            yield f"{flag}: asked for {_shown(wanted)}, the robot has {_shown(known[flag])}"


def _meets(wanted: bool | float | str, has: Any) -> bool:
    """A truth value wants the same truth, a number at least that much, a text itself or a list that holds it."""
    if isinstance(wanted, bool):
        return bool(has) == wanted
    if isinstance(wanted, str):
        return wanted in has if isinstance(has, tuple) else wanted == has
    return isinstance(has, bool | int | float) and has >= wanted


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else repr(value)


def _runtime(skill: Manifest, robot: Robot) -> Iterator[str]:
    supported = robot.compute.gpu_supported_runtimes if robot.compute else ()
    if not supported:
        raise _Unknown("the robot does not say which runtimes its computer has")
    if skill.runtime not in supported:
        yield f"runs in {skill.runtime}; the robot's computer has {', '.join(supported)}"


def _dtype(skill: Manifest, robot: Robot) -> Iterator[str]:
    supported = robot.compute.gpu_supported_dtypes if robot.compute else ()
    if not supported:
        raise _Unknown("the robot does not say which dtypes its computer has")
    if skill.quantization.dtype not in supported:
        yield f"loads in {skill.quantization.dtype}; the robot's computer has {', '.join(supported)}"


def _sensors(skill: Manifest, robot: Robot) -> Iterator[str]:
    for wanted in skill.sensors_required:
        smallest = "".join(
            f", {side} at least {size}"
            for side, size in (("width", wanted.min_width), ("height", wanted.min_height))
            if size is not None
        )
        if wanted.vla_feature_key is None:
            fit = sum(_serves(sensor, wanted) for sensor in robot.sensors)
            if fit < wanted.count:
                yield f"{wanted.count} x {wanted.modality}{smallest}: the robot has {fit}"
            continue
        named = [sensor for sensor in robot.sensors if sensor.vla_feature_key == wanted.vla_feature_key]
        if not named:
            yield f"{wanted.vla_feature_key}: no sensor of the robot has this key"
        elif not _serves(named[0], wanted):
            yield f"{wanted.vla_feature_key}: {wanted.modality}{smallest}; the robot's is {_described(named[0])}"


def _serves(sensor: Sensor, wanted: SensorRequirement) -> bool:
    if sensor.modality != wanted.modality:
        return False
    if wanted.min_width is None and wanted.min_height is None:
        return True
    size = sensor.intrinsics
    return size is not None and size.width >= (wanted.min_width or 0) and size.height >= (wanted.min_height or 0)


def _described(sensor: Sensor) -> str:
    size = sensor.intrinsics
    return f"{sensor.modality}, " + (f"{size.width} x {size.height}" if size else "of unknown size (no intrinsics)")


# ---- beyond it -----------------------------------------------------------------------------------------------------
def _actuators(skill: Manifest, robot: Robot) -> Iterator[str]:
    """Control modes that the robot has, as many joints, and the joints and end effectors that actions name."""
    modes = robot.capabilities.supported_control_modes
    slots = (skill.action_contract.slots or ()) if skill.action_contract else ()
    asked = dict.fromkeys(
        [a.kind for a in skill.actuators_required] + [s.control_mode for s in slots if s.control_mode]
    )
    found = [f"commands {kind}; the robot takes {', '.join(modes)}" for kind in asked if modes and kind not in modes]
    moving = sum(joint.joint_type != "fixed" for joint in robot.joints)
    found += [
        f"commands {actuator.n_dof} joints by {actuator.kind}; the robot has {moving}"
        for actuator in skill.actuators_required
        if actuator.kind.startswith("joint_") and (actuator.n_dof or 0) > moving
    ]
    joints = [name for a in skill.actuators_required for name in a.control_mode_semantics.joint_order or ()]
    joints += [name for slot in slots for name in slot.joint_names]
    ends = {slot.ee for slot in slots if slot.ee} - {end.name for end in robot.end_effectors}
    for what, names in (("joints", set(joints)), ("end effectors", ends)):
        if stray := sorted(names - robot.joint_names):
            found.append(f"names {what} that the robot does not have: {', '.join(stray)}")
    if asked and not modes and not found:
        raise _Unknown("the robot does not say which control modes it takes")
    yield from found


def _memory(skill: Manifest, robot: Robot) -> Iterator[str]:
    needs, has = skill.memory_gb, robot.compute.gpu_vram_gb if robot.compute else None
    if needs is None:
        raise _Unknown(f"the skill does not say what it needs in {skill.quantization.dtype}")
    if has is None:
        raise _Unknown("the robot does not say how much GPU memory its computer has")
    if needs > has:
        yield f"needs {needs:g} GB of GPU memory in {skill.quantization.dtype}; the robot's computer has {has:g}"


def _envelope(skill: Manifest, robot: Robot) -> Iterator[str]:
    if skill.envelope is not None:
        yield from looser(skill.envelope, robot.safety)


CHECKS: dict[str, Callable[[Manifest, Robot], Iterator[str]]] = {
    "embodiment": _embodiment,
    "capability": _capability,
    "runtime": _runtime,
    "dtype": _dtype,
    "sensors": _sensors,
    "actuators": _actuators,
    "memory": _memory,
    "envelope": _envelope,
}
OURS = ("actuators", "memory", "envelope")
"""Checks that the reference does not have."""
