"""Meta-World as a policy meets it: two small cameras, hand position and gripper opening, an action held for some steps.

What a policy may see (`proprioception`, `images`) and what only the scripted expert may see (`privileged`) are separate
methods, and nothing of the second leaks into the first.

Traps of Meta-World that are dealt with here: the goal marker would give the instruction away (hidden); `env.seed`
wants a
Python int; rendering as shipped is slow (no MSAA, shadows or reflections; the arm's far links are hidden, which also
frees the
top view).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prts_core.io.errors import lookup, require
from prts_core.sim.rendering import Renderer

if TYPE_CHECKING:
    from prts_core.config.schema import MetaworldSource

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")

CAMERAS = ("top", "wrist")
STATE_WIDTH, ACTION_WIDTH = 4, 4
SIMULATOR_HZ = 80.0  # 5 physics steps of 2.5 ms
_ARM = tuple(f"right_l{i}" for i in range(7))
_HIDDEN_BODIES = (
    "base",
    "controller_box",
    "pedestal_feet",
    "pedestal",
    "torso",
    "head",
    "screen",
    "right_arm_base_link",
    "right_hand",
    *_ARM,
)


@dataclass(frozen=True)
class Phases:
    """How an expert's phases are told apart: the hand against a point beside the object, and what each is called.

    offset, xy, z in metres; axes: those along which the hand must be lined up first.
    """

    offset: tuple[float, float, float]
    xy: float
    z: float
    sentences: tuple[str, ...]
    axes: tuple[int, ...] = (0, 1)

    def at(self, privileged: np.ndarray) -> int:
        """0 while the hand is not over the point, 1 while it is over it but not at its height, 2 at work."""
        gap = privileged[:3] - (privileged[4:7] + np.asarray(self.offset))
        if np.linalg.norm(gap[list(self.axes)]) > self.xy:
            return 0
        return 1 if len(self.sentences) == 3 and abs(gap[2]) > self.z else len(self.sentences) - 1


# The points are those the scripted experts of Meta-World steer by.
_BESIDE = "lower the hand beside it"
PHASES: dict[str, Phases] = {
    "faucet-open": Phases((-0.04, 0.0, 0.03), 0.04, 0.04, ("reach the faucet handle", _BESIDE, "turn it open")),
    "faucet-close": Phases((0.04, 0.0, 0.03), 0.04, 0.04, ("reach the faucet handle", _BESIDE, "turn it closed")),
    "window-open": Phases((-0.03, -0.03, -0.08), 0.04, 0.02, ("reach the window handle", _BESIDE, "slide it open")),
    "window-close": Phases((0.03, -0.03, -0.08), 0.04, 0.02, ("reach the window handle", _BESIDE, "slide it closed")),
    "plate-slide": Phases((0.0, -0.055, 0.03), 0.03, 0.04, ("reach behind the plate", "lower the hand", "push it in")),
    "handle-pull": Phases((0.0, -0.04, 0.0), 0.02, 0.02, ("reach under the handle", "close in on it", "pull it up")),
    "dial-turn": Phases((0.05, 0.02, 0.09), 0.02, 0.02, ("reach the dial", _BESIDE, "turn it")),
    "button-press-topdown": Phases((0.0, 0.0, 0.0), 0.04, 0.04, ("reach over the button", "press it down")),
    "button-press-topdown-wall": Phases((0.0, -0.06, 0.0), 0.04, 0.04, ("reach over the wall", "press it down")),
    "coffee-button": Phases((0.0, 0.0, -0.07), 0.02, 0.02, ("line up with the button", "press it"), (0,)),
    "door-unlock": Phases((-0.04, -0.02, -0.03), 0.06, 0.04, ("reach the lock", _BESIDE, "turn it open")),
}


# One for all environments of a task and size in this process: meshes and textures are uploaded once, and body positions
# that a reset moves are read from the environment's own model.
_RENDERERS: dict[tuple[str, int], Renderer] = {}


class MetaworldEnv:
    """One task. Reset by seed, step by rows (an action held for `action_repeat` simulator steps)."""

    def __init__(self, task: str, *, image_size: int = 64, action_repeat: int = 2, start_jitter: int = 0) -> None:
        lookup(PHASES, task, "Meta-World task")
        require("metaworld", "sim")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        self.task, self.image_size = task, image_size
        self.action_repeat, self.start_jitter = action_repeat, start_jitter
        # The goal-observable variant only changes what `privileged` holds; the task and its success rule are the same.
        self.env: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)  # type: ignore[call-arg]
        self.env._freeze_rand_vec, self.env.seeded_rand_vec, self.env.max_path_length = False, True, 10**9
        self._simplify_scene()
        self.elapsed = 0
        self._privileged = np.zeros(39)

    @staticmethod
    def of(task: str, source: MetaworldSource) -> MetaworldEnv:
        """The environment that a dataset's demonstrations were recorded in, for whoever must meet the same one."""
        return MetaworldEnv(
            task, image_size=source.image_size, action_repeat=source.action_repeat, start_jitter=source.start_jitter
        )

    def _simplify_scene(self) -> None:
        model = self.env.model
        model.vis.quality.offsamples = 0
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        model.site_rgba[:, 3] = 0  # goal markers
        hidden = [model.body(i).id for i in range(model.nbody) if model.body(i).name in _HIDDEN_BODIES]
        geoms = np.isin(model.geom_bodyid, hidden)
        model.geom_rgba[geoms, 3] = 0
        model.geom_matid[geoms] = -1
        top = model.camera("topview").id
        model.cam_pos[top], model.cam_fovy[top] = (0.0, 0.68, 1.5), 28.0
        self.camera_ids = {"top": top, "wrist": model.camera("gripperPOV").id}

    def reset(self, seed: int) -> None:
        """Meta-World's own random scene for `seed`; then the hand is moved off its fixed start by a random
        displacement of
        up to `start_jitter` cm along each axis, drawn from the same seed, so that no fixed motion solves a task."""
        self.env.seed(int(seed))
        self._privileged, _ = self.env.reset()
        if self.start_jitter:
            shift = np.r_[np.random.default_rng([int(seed), 1]).uniform(-1.0, 1.0, 3), -1.0]
            for _ in range(self.start_jitter):
                self._privileged, *_ = self.env.step(shift)
        self.elapsed = 0

    def step(self, action: np.ndarray) -> bool:
        """Hold `action` (4,), clipped to [-1, 1], for one row; True if the task's own success flag was raised in it."""
        success = False
        held = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        for _ in range(self.action_repeat):
            self._privileged, _, _, _, info = self.env.step(held)
            self.elapsed += 1
            success |= bool(info["success"])
        return success

    def proprioception(self) -> np.ndarray:
        """(4,) float32: hand position in metres and gripper opening in [0, 1]. All that a policy learns besides
        images."""
        return np.r_[self.env.get_endeff_pos(), self._gripper_opening()].astype(np.float32)

    def _gripper_opening(self) -> float:
        gap = self.env.data.body("rightclaw").xpos - self.env.data.body("leftclaw").xpos
        return float(np.clip(np.linalg.norm(gap) / 0.1, 0.0, 1.0))

    def images(self) -> dict[str, np.ndarray]:
        """{"top", "wrist"}: (size, size, 3) uint8."""
        return {name: self._picture(self.image_size, camera) for name, camera in self.camera_ids.items()}

    def film(self) -> np.ndarray:
        """(256, 512, 3) uint8 picture for people: what both cameras see, larger than the policy gets it."""
        return np.concatenate([self._picture(256, camera) for camera in self.camera_ids.values()], axis=1)

    def _picture(self, size: int, camera: int) -> np.ndarray:
        key = (self.task, size)
        if key not in _RENDERERS:
            _RENDERERS[key] = Renderer(self.env.model, size, plain=True)
        return _RENDERERS[key](self.env.data, camera, self.env.model)[::-1].copy()

    def privileged(self) -> np.ndarray:
        """(39,) what the scripted expert sees, object poses and goal included. Never given to a policy."""
        return self._privileged

    def simulator_state(self) -> np.ndarray:
        """(nq + nv,) float64, for the raw recordings' `states`."""
        return np.r_[self.env.data.qpos, self.env.data.qvel]


class ScriptedExpert:
    """Meta-World's own scripted policy for one task."""

    def __init__(self, task: str) -> None:
        require("metaworld", "sim")
        from metaworld.policies import ENV_POLICY_MAP

        expert: Any = ENV_POLICY_MAP[f"{task}-v3"]
        self.policy, self.phases = expert(), PHASES[task]

    def act(self, env: MetaworldEnv) -> np.ndarray:
        """(4,) float32 in [-1, 1]."""
        return np.clip(self.policy.get_action(env.privileged()), -1.0, 1.0).astype(np.float32)
