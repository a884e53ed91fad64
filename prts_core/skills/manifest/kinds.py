"""Say what each kind of skill must have and must not have: a table, and the one function that reads it.

A new kind is a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prts_core.skills.manifest.document import Manifest

KindName = Literal["vla", "wam", "ros_action", "ros_service", "detector", "vlm", "reward", "playbook"]

POLICY = ("model_family", "processors", "state_contract", "action_contract", "n_action_steps", "starting_pose")
BLOCKS = ("ros_integration", "detector", "reward", "playbook")
PROCESSED_FAMILIES = ("smolvla", "pi05", "xvla", "diffusion", "rldx", "molmoact2")
"""Families whose checkpoints come with processor files."""


@dataclass(frozen=True)
class Kind:
    """needs, forbids: fields of the manifest. actuators: whether it commands some, none, or either. chunk_size, role,
    verb: what they have to be. resolvable: whether anything can load it."""

    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    actuators: Literal["some", "none", "either"] = "either"
    chunk_size: int | None = None
    role: str | None = None
    verb: str | None = None
    resolvable: bool = True


def _other_blocks(own: str) -> tuple[str, ...]:
    return tuple(name for name in BLOCKS if name != own)


def _perception(own: str, *forbids: str) -> Kind:
    needs = ("weights_uri", own) if own else ("weights_uri",)
    return Kind(needs, (*POLICY, *_other_blocks(own), "reward_rskill_name", *forbids), actuators="none")


_ROS = Kind(
    needs=("ros_integration",),
    forbids=(*POLICY, "weights_uri", "image_preprocessing", *_other_blocks("ros_integration"), "reward_rskill_name"),
    actuators="some",
    chunk_size=1,
)
KINDS: dict[KindName, Kind] = {
    "vla": Kind(needs=("model_family", "weights_uri"), forbids=BLOCKS, actuators="some"),
    "wam": Kind(forbids=("playbook", "reward_rskill_name"), resolvable=False),
    "ros_action": _ROS,
    "ros_service": _ROS,
    "detector": _perception("detector"),
    "vlm": _perception("", "image_preprocessing"),
    "reward": _perception("reward", "image_preprocessing"),
    "playbook": Kind(
        needs=("playbook",),
        forbids=(
            *POLICY,
            "weights_uri",
            "min_vram_gb",
            "envelope",
            "image_preprocessing",
            *_other_blocks("playbook"),
            "reward_rskill_name",
        ),
        actuators="none",
        chunk_size=1,
        role="s2",
        verb="plan",
    ),
}


def faults_of_kind(manifest: Manifest) -> Iterator[str]:
    """What of a manifest does not go with its kind, a sentence each."""
    kind, name = KINDS[manifest.kind], f"kind {manifest.kind}"
    for field in kind.needs:
        if getattr(manifest, field) is None:
            yield f"{name} needs {field}"
    for field in kind.forbids:
        if getattr(manifest, field) is not None:
            yield f"{name} has no {field}"
    if kind.actuators == "some" and not manifest.actuators_required:
        yield f"{name} commands at least one actuator (actuators_required)"
    if kind.actuators == "none" and manifest.actuators_required:
        yield f"{name} commands no actuators (actuators_required)"
    for field, wanted in (("chunk_size", kind.chunk_size), ("role", kind.role)):
        if wanted is not None and getattr(manifest, field) != wanted:
            yield f"{name} has {field} {wanted}, not {getattr(manifest, field)}"
    if kind.verb is not None and kind.verb not in manifest.actions:
        yield f"{name} has {kind.verb!r} among its actions"
    if manifest.kind == "vla" and manifest.model_family in PROCESSED_FAMILIES and manifest.processors is None:
        yield f"model_family {manifest.model_family} needs processors"
