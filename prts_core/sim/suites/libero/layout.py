"""A recorded LIBERO episode as LIBERO's own demonstration files have it: names, conventions, attributes.

The pictures stand on their heads there (OpenGL's rows, from the bottom up).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from prts_core.sim.suite import SuiteSpec, Task

CAMERAS = {
    "observation.images.image": "obs/agentview_rgb",
    "observation.images.wrist_image": "obs/eye_in_hand_rgb",
}
ARM = slice(1, 8)  # of a stored state: time, then the arm's seven joints


def datasets(episode: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of T rows below a demonstration, from the arrays of sim/expert_episode.py."""
    proprio, states = np.asarray(episode["proprio"], np.float64), np.asarray(episode["states"])
    position, rotation, fingers = proprio[:, :3], proprio[:, 3:6], proprio[:, 6:8]
    pictures = {CAMERAS[key]: seen[:, ::-1, ::-1] for key, seen in episode["images"].items()}
    return {
        "robot_states": np.c_[fingers, position, Rotation.from_rotvec(rotation).as_quat()],
        "obs/ee_pos": position,
        "obs/ee_ori": rotation,
        "obs/ee_states": np.c_[position, rotation],
        "obs/gripper_states": fingers,
        "obs/joint_states": states[:, ARM],
        **pictures,
    }


def attributes(suite: SuiteSpec, task: Task, image_size: int) -> dict[str, str]:
    """Of the group `data`."""
    bddl = f"bddl_files/{suite.name}/{task.name}.bddl"
    return {
        "bddl_file_name": bddl,
        "env_name": suite.name,
        "env_args": json.dumps(
            {
                "type": 1,
                "env_name": suite.name,
                "bddl_file": bddl,
                "env_kwargs": {
                    "bddl_file_name": bddl,
                    "camera_heights": image_size,
                    "camera_widths": image_size,
                    "control_freq": int(suite.contract.control_hz),
                    "controller": "OSC_POSE",
                    "robots": ["Panda"],
                },
            },
            sort_keys=True,
        ),
        "macros_image_convention": "opengl",
        "tag": "libero-v1",
    }
