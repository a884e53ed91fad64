"""Write the folder of a new skill package: a manifest that is sound and says of every field what to put there.

It keeps the words TEMPLATE_ORG and TEMPLATE_ID, so that nobody installs or publishes it as it is.
"""

from __future__ import annotations

from pathlib import Path

from prts_core.io.files import new_folder
from prts_core.skills.digests import EVALUATIONS
from prts_core.skills.manifest import FILE, read_manifest

MANIFEST = """\
# A skill package: what it is, what it needs of a robot and of a computer, and what it was measured to do.
# docs/how-to/skills.md says what every field means; `prts skill check .` says whether this file is sound.

# Who it is. Replace TEMPLATE_ORG and TEMPLATE_ID wherever they stand; until then nobody can install the package.
schema_version: "0.1"
name: TEMPLATE_ORG/rskill-TEMPLATE_ID
version: 0.1.0
kind: vla                      # or detector, vlm, reward, ros_action, ros_service, playbook; each needs other fields
license: unknown               # of the weights: apache-2.0, mit, bsd, nvidia_open_model, ...
role: s1                       # s1: at control rate; s2: what reasons
model_family: act
description: >
  One or two sentences on what the skill does, with which objects and where. Whoever chooses among skills reads this.
actions: [pick, place]         # verbs of a closed list
objects: [cube]
scenes: [tabletop]

# What it needs of a robot. A tag must be among the robot's own; every camera is found by its key.
embodiment_tags: [franka_panda]
sensors_required:
  - modality: rgb
    vla_feature_key: observation.images.camera1
    min_width: 224
    min_height: 224
actuators_required:
  - kind: joint_position       # gripper kinds also say gripper_convention, cartesian ones reference_frame
    control_mode_semantics: {mode: absolute}

# What it needs of a computer.
runtime: pytorch
quantization: {dtype: bf16}    # how the weights are loaded; NF4 is int4
min_vram_gb: {bf16: 2.0}       # GB; `prts skill check --robot` holds the dtype above against the robot's GPU
latency_budget:
  per_chunk_ms: 100.0          # one inference

# The policy: where its weights are, and what its numbers mean.
weights_uri: hf://TEMPLATE_ORG/TEMPLATE_ID    # @revision pins it; local://weights lies in this folder
state_contract: {dim: 8}
action_contract: {dim: 8, representation: joint_positions}
chunk_size: 16                 # actions of one inference
n_action_steps: 8              # how many of them are executed before the next

# Where it comes from, and the tasks it was made for.
source_repo: hf://TEMPLATE_ORG/TEMPLATE_ID
evaluated_tasks: [libero_spatial]
"""
README = """\
# rskill-TEMPLATE_ID

What this skill does, on which robot, how it was trained, and what its licence asks of whoever uses it.

1. Replace TEMPLATE_ORG and TEMPLATE_ID in `rskill.yaml`.
2. `prts skill check . --robot robot.yaml`
3. `prts skill install .`
"""


def write_template(folder: Path) -> Path:
    """Write the folder, which must not exist; returns it."""
    with new_folder(folder) as partial:
        (partial / FILE).write_text(MANIFEST)
        (partial / "README.md").write_text(README)
        (partial / EVALUATIONS).mkdir()
        read_manifest(partial)
    return folder
