"""Say of a policy of ours what the public skill schema has words for: its rskill.yaml, made from its contract.

What the schema has no words for lies in files beside it: policy_contract.json says what every number means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from prts_core import __version__
from prts_core.config.licence import Licence
from prts_core.contract import Dimension, PolicyContract
from prts_core.skills.manifest import Manifest
from prts_core.skills.manifest.contracts import ActionContract, Representation, StateContract
from prts_core.skills.manifest.identity import CUSTOM, EmbodimentTag, Verb
from prts_core.skills.manifest.interfaces import (
    ActuatorRequirement,
    ControlMode,
    ControlModeSemantics,
    EmbodimentExtra,
    SensorRequirement,
)
from prts_core.skills.manifest.resources import Dtype, LatencyBudget, Quantization

# The schema's families name the adapter that loads a checkpoint. Ours is asked over GR00T's protocol, which
# `prts serve --protocol groot` speaks, so it is loaded as that family is; its own format stands in policy_extras.
FAMILY = "gr00t"
ROBOTS: dict[str, EmbodimentTag] = {
    "metaworld_sawyer": "sawyer",
    "libero_panda": "franka_panda",
    "widowx_bridge": "widowx",
    "unitree_g1_inspire": "g1",
}
"""Our embodiment tags -> the schema's. A robot that it does not know is `custom`, and the manifest says what it has."""

HAND = re.compile(r"(?:hand_|ee_|eef_|tcp_)?(?P<delta>d)?_?(?:x|y|z|roll|pitch|yaw|rotation_?\w*|axis_angle_?\w*)")
GRIPPER = re.compile(r"gripper|finger")
CONVENTIONS = (  # what a contract says of the gripper -> the schema's word, and the control mode that goes with it
    (re.compile(r"-1 opens.*\+?1 closes"), "gripper_binary", "binary_close_one"),
    (re.compile(r"0 closed.*1 open|\+?1 opens.*0 closes"), "gripper_position", "normalized_open_unit"),
    (re.compile(r"-1 closes.*\+?1 opens"), "gripper_position", "normalized_open_symmetric"),
)


@dataclass(frozen=True)
class Terms:
    """What a package says of itself that no file of the policy does. name: owner/repository."""

    name: str
    licence: Licence
    description: str
    per_chunk_ms: float
    tasks: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()
    dtype: Dtype = "fp32"
    quantization: dict[str, Any] = field(default_factory=dict)


def skill_manifest(contract: PolicyContract, terms: Terms, extras: dict[str, Any]) -> Manifest:
    """The manifest of a policy with this contract, weights in the package's own folder. extras: of policy_extras."""
    meant = contract.contract
    tag = ROBOTS.get(contract.embodiment_tag, contract.embodiment_tag)
    known = tag if tag in get_args(EmbodimentTag) and tag != CUSTOM else None
    sensors = tuple(SensorRequirement("rgb", c.key, min_width=c.width, min_height=c.height) for c in meant.cameras)
    sensors = sensors or (SensorRequirement("joint_state"),)
    actuators = tuple(_actuators(meant.action, meant.gripper))
    return Manifest(
        name=terms.name,
        version=__version__,
        kind="vla",
        license=terms.licence,
        model_family=FAMILY,  # type: ignore[arg-type]
        description=terms.description,
        actions=_verbs(terms.sentences),
        scenes=tuple(dict.fromkeys(task.partition("/")[0] for task in terms.tasks)),
        embodiment_tags=(known or CUSTOM,),  # type: ignore[arg-type]
        embodiment_extra=None if known else EmbodimentExtra(sensors, actuators),
        sensors_required=sensors,
        actuators_required=actuators,
        quantization=Quantization(terms.dtype, extra=terms.quantization),
        weights_uri="local://.",
        state_contract=StateContract(dim=len(meant.state)),
        action_contract=ActionContract(len(meant.action), _representation(actuators)),
        chunk_size=contract.chunk_length,
        n_action_steps=max(1, contract.chunk_length // 2),
        latency_budget=LatencyBudget(terms.per_chunk_ms),
        policy_extras=extras,
        evaluated_tasks=terms.tasks,
    )


def _verbs(sentences: Iterable[str]) -> tuple[Verb, ...]:
    """The schema's verbs that the instructions use; of none, that it is a generalist."""
    said = {word for sentence in sentences for word in re.findall(r"[a-z]+", sentence.lower())}
    return tuple(verb for verb in get_args(Verb) if verb in said) or ("generalist",)


def _actuators(action: Sequence[Dimension], gripper: str) -> Iterable[ActuatorRequirement]:
    """One actuator for every run of numbers that command the same thing."""
    count: dict[tuple[ControlMode, ControlModeSemantics], int] = {}
    for dimension in action:
        meant = _commands(dimension, gripper)
        count[meant] = count.get(meant, 0) + 1
    for (kind, semantics), number in count.items():
        yield ActuatorRequirement(kind, semantics, n_dof=number, vla_action_key="action")


def _commands(dimension: Dimension, gripper: str) -> tuple[ControlMode, ControlModeSemantics]:
    """What a number commands, by its name and its contract's words; `composite_mode` where they do not tell."""
    if GRIPPER.search(dimension.name):
        for words, kind, convention in CONVENTIONS:
            if words.search(gripper):
                return kind, ControlModeSemantics("absolute", gripper_convention=convention)  # type: ignore[return-value, arg-type]
        return "composite_mode", ControlModeSemantics("absolute")
    if hand := HAND.fullmatch(dimension.name):
        delta = hand["delta"] is not None
        kind, mode = ("cartesian_delta", "delta") if delta else ("cartesian_pose", "absolute")
        return kind, ControlModeSemantics(mode, reference_frame="base")  # type: ignore[return-value, arg-type]
    if dimension.unit == "rad" or "joint" in dimension.name:
        return "joint_position", ControlModeSemantics("absolute")
    return "composite_mode", ControlModeSemantics("absolute")


def _representation(actuators: Sequence[ActuatorRequirement]) -> Representation | None:
    """The schema's word for the whole vector, where it has one."""
    arm = {a.kind: a.n_dof for a in actuators if not a.kind.startswith("gripper_")}
    grips = sum(a.n_dof or 0 for a in actuators if a.kind.startswith("gripper_"))
    known: dict[tuple[str, int | None, int], Representation] = {
        ("cartesian_delta", 6, 1): "delta_ee_6d_plus_gripper",
        ("cartesian_delta", 6, 0): "delta_ee_6d",
        ("cartesian_delta", 3, 1): "delta_ee_3d_plus_gripper",
        ("cartesian_pose", 6, 0): "cartesian_pose",
    }
    if set(arm) == {"joint_position"}:
        return "joint_positions"
    return known.get((*next(iter(arm.items())), grips)) if len(arm) == 1 else None
