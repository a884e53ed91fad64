"""Packages and robots for tests, made of the template: small, sound, with weights of a few bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from prts_core.io.plain_yaml import parse
from prts_core.skills.manifest import Manifest, check_manifest
from prts_core.skills.robot import Robot, check_robot
from prts_core.skills.template import MANIFEST

NAME = "owner/rskill-pick-cube"


def raw_manifest(**change: Any) -> dict[str, Any]:
    """The template's manifest with its words replaced, and changes; a value of None takes a key away."""
    text = MANIFEST.replace("TEMPLATE_ORG", "owner").replace("TEMPLATE_ID", "pick-cube")
    raw = parse(text) | {"license": "mit", "weights_uri": "local://weights"} | change
    return {key: value for key, value in raw.items() if value is not None}


def manifest(**change: Any) -> Manifest:
    return check_manifest(raw_manifest(**change), "a test")


def write_package(folder: Path, weights: bytes = b"weights", **change: Any) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "rskill.yaml").write_text(yaml.safe_dump(raw_manifest(**change)))
    (folder / "weights" / "model.safetensors").write_bytes(weights)
    return folder


def raw_robot(**change: Any) -> dict[str, Any]:
    """A robot that the template's skill fits."""
    joints = [
        {"name": f"joint{n}", "joint_type": "revolute", "parent_link": f"l{n}", "child_link": f"l{n + 1}"}
        for n in range(8)
    ]
    size = {"width": 256, "height": 256, "fx": 1.0, "fy": 1.0, "cx": 128.0, "cy": 128.0}
    camera = {"name": "top", "modality": "rgb", "frame_id": "world", "rate_hz": 30, "intrinsics": size}
    return {
        "schema_version": "0.2",
        "name": "arm",
        "embodiment_kind": "manipulator",
        "joints": joints,
        "sensors": [camera | {"vla_feature_key": "observation.images.camera1"}],
        "capabilities": {
            "can_lift_kg": 3,
            "embodiment_tags": ["franka_panda"],
            "supported_control_modes": ["joint_position"],
        },
        "safety": {"max_force_n": 20.0, "workspace_box_min_xyz": [-1, -1, 0], "deadman_required": True},
        "compute_edge": {
            "gpu_supported_runtimes": ["pytorch"],
            "gpu_supported_dtypes": ["bf16", "int4"],
            "gpu_vram_gb": 8,
        },
    } | change


def robot(**change: Any) -> Robot:
    return check_robot(raw_robot(**change), "a test")
