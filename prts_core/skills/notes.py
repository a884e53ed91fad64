"""Look for what in a sound manifest is likely to be a mistake: nothing here refuses a package."""

from __future__ import annotations

from collections.abc import Iterator

from prts_core.skills.manifest import Manifest
from prts_core.skills.manifest.contracts import Representation
from prts_core.skills.manifest.weights import hub_parts

COMMANDED: dict[Representation, tuple[str, str | None]] = {
    "joint_positions": ("joint_", "absolute"),
    "joint_velocities": ("joint_", None),
    "delta_ee_6d_plus_gripper": ("cartesian_", "delta"),
    "delta_ee_6d": ("cartesian_", "delta"),
    "delta_ee_3d_plus_gripper": ("cartesian_", "delta"),
    "cartesian_pose": ("cartesian_", "absolute"),
}
"""What the control modes of an arm begin with, and their semantics, where its actions are of that representation."""


def notes(manifest: Manifest) -> Iterator[str]:
    """A sentence for everything that a reader should look at."""
    yield from _actions(manifest)
    named = hub_parts(manifest.weights_uri or "")
    if named is not None and named[1] is None:
        yield "weights_uri names no revision: which weights it means changes with the repository"
    if manifest.kind == "vla" and not manifest.evaluated_tasks:
        yield "evaluated_tasks is empty: nothing says which tasks the checkpoint was made for"
    if manifest.min_vram_gb and manifest.memory_gb is None:
        yield f"min_vram_gb does not say what {manifest.quantization.dtype} needs, which is how the skill is loaded"


def _actions(manifest: Manifest) -> Iterator[str]:
    steps, chunk, contract = manifest.n_action_steps, manifest.chunk_size, manifest.action_contract
    if steps is not None and steps > chunk:
        yield f"n_action_steps {steps} is more than a chunk holds ({chunk})"
    if contract is None:
        return
    if contract.representation is not None:
        prefix, mode = COMMANDED[contract.representation]
        for actuator in manifest.actuators_required:
            kind, said = actuator.kind, actuator.control_mode_semantics.mode
            arm = kind.startswith(("joint_", "cartesian_"))
            if arm and not (kind.startswith(prefix) and mode in (None, said)):
                yield f"actuators_required says {said} {kind}, action_contract says {contract.representation}"
    kinds = {actuator.kind for actuator in manifest.actuators_required}
    slots = dict.fromkeys(slot.control_mode for slot in contract.slots or () if slot.control_mode)
    if missing := [mode for mode in slots if mode not in kinds]:
        yield f"slots command {', '.join(missing)}, which actuators_required does not name"
    if manifest.starting_pose is not None and len(manifest.starting_pose) != contract.dim:
        yield f"starting_pose has {len(manifest.starting_pose)} numbers, an action {contract.dim}"
