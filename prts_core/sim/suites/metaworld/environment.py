"""Runs Meta-World in a worker: two small cameras, hand position and gripper opening, an action held for some steps.

Traps of Meta-World that are dealt with here: the goal marker would give the instruction away (hidden); `env.seed` wants
a Python int; rendering as shipped is slow (no multisampling, shadows or reflections; the arm's far links are hidden,
which also frees the top view).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError, lookup, require
from prts_core.sim.lru import LruCache
from prts_core.sim.rendering import Renderer
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.suites.metaworld.expert import PHASES
from prts_core.sim.suites.metaworld.spec import SIMULATOR_HZ, START_JITTER, suites_for

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")

KEPT = 2  # scenes: one takes 20 MB and 0.3 s to build; as tasks are dealt out, a slot comes and goes between two
RENDERERS = 2  # one takes 40 MB and 0.15 s to make
RENDER_SIZE = 256
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
    *(f"right_l{i}" for i in range(7)),
)


class Scene:
    """One task's simulation, built once. renderers: (scene, size) -> its renderer; scenes may share them."""

    def __init__(self, task: str, renderers: Renderers | None = None) -> None:
        lookup(PHASES, task, "Meta-World task")
        require("metaworld", "sim")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        # The goal-observable variant only changes what `privileged` holds; the task and its success rule are the same.
        self.env: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)  # type: ignore[call-arg]
        self.env._freeze_rand_vec, self.env.seeded_rand_vec, self.env.max_path_length = False, True, 10**9
        self.renderers = make_renderers() if renderers is None else renderers
        self.privileged = np.zeros(39)  # object poses and goal included
        model = self.env.model
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        model.site_rgba[:, 3] = 0  # goal markers
        hidden = [model.body(i).id for i in range(model.nbody) if model.body(i).name in _HIDDEN_BODIES]
        geoms = np.isin(model.geom_bodyid, hidden)
        model.geom_rgba[geoms, 3] = 0
        model.geom_matid[geoms] = -1
        top = model.camera("topview").id
        model.cam_pos[top], model.cam_fovy[top] = (0.0, 0.68, 1.5), 28.0
        self.cameras = {"top": top, "wrist": model.camera("gripperPOV").id}

    def reset(self, seed: int, start_jitter: int) -> None:
        """Meta-World's own random scene for `seed`; then the hand is moved off its fixed start by a random displacement
        of up to `start_jitter` cm along each axis, drawn from the same seed, so that no fixed motion solves a task."""
        self.env.seed(int(seed))
        self.privileged, _ = self.env.reset()
        shift = np.r_[np.random.default_rng([int(seed), 1]).uniform(-1.0, 1.0, 3), -1.0]
        for _ in range(start_jitter):
            self.step(shift)

    def step(self, action: np.ndarray) -> bool:
        """One simulator step; whether the task's own success flag was raised in it."""
        self.privileged, _, _, _, info = self.env.step(action)
        return bool(info["success"])

    def picture(self, camera: str, size: int) -> np.ndarray:
        """(size, size, 3) uint8."""
        return self.renderers((self, size))(self.env.data, self.cameras[camera])[::-1].copy()

    def close(self) -> None:
        for key in [key for key in self.renderers.held if key[0] is self]:
            self.renderers.held.pop(key).close()


Renderers = LruCache[tuple[Scene, int], Renderer]


def make_renderers() -> Renderers:
    return LruCache(lambda key: Renderer(key[0].env.model, key[1], plain=True), RENDERERS, Renderer.close)


class MetaworldEnvironment:
    """See prts_core.sim.suite.Environment. Reward: 1 where the task's own success flag is raised, else 0.

    A step is an action held for the simulator steps that the suite's control rate leaves it. perturbation:
    `start_jitter`, centimetres, in place of the suite's.
    """

    def __init__(self, start_jitter: int = START_JITTER) -> None:
        self.start_jitter = start_jitter
        renderers = make_renderers()
        self.scenes: LruCache[str, Scene] = LruCache(lambda task: Scene(task, renderers), KEPT, Scene.close)
        self.current: Scene | None = None
        self.repeat = 1
        self.cameras: dict[str, tuple[str, int]] = {}  # key -> Meta-World's camera, size

    @property
    def scene(self) -> Scene:
        assert self.current is not None, "reset comes first"
        return self.current

    def reset(self, suite: SuiteSpec, task: Task, initial_state: int, seed: int) -> None:
        unknown = set(task.perturbation) - {"start_jitter"}
        if unknown:
            raise ConfigError(
                "Meta-World has no such perturbation", field="perturbation", found=min(unknown), expected="start_jitter"
            )
        self.repeat = round(SIMULATOR_HZ / suite.contract.control_hz)
        self.cameras = {camera.key: (camera.key.rsplit(".", 1)[-1], camera.height) for camera in suite.contract.cameras}
        self.current = self.scenes(task.name)
        self.current.reset(seed + initial_state, int(task.perturbation.get("start_jitter", self.start_jitter)))

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        held = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        success = sum(self.scene.step(held) for _ in range(self.repeat)) > 0
        return float(success), success

    def proprioception(self) -> np.ndarray:
        """(4,) float32: hand position in metres and gripper opening in [0, 1]. All that a policy learns besides
        images."""
        env = self.scene.env
        gap = env.data.body("rightclaw").xpos - env.data.body("leftclaw").xpos
        return np.r_[env.get_endeff_pos(), np.clip(np.linalg.norm(gap) / 0.1, 0.0, 1.0)].astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {key: self.scene.picture(*camera) for key, camera in self.cameras.items()}

    def render(self) -> np.ndarray:
        """(256, 512, 3): what both cameras see, larger than the policy gets it."""
        return np.concatenate([self.scene.picture(name, RENDER_SIZE) for name, _ in self.cameras.values()], axis=1)

    def privileged(self) -> dict[str, Any]:
        return {"observation": self.scene.privileged}

    def state(self) -> np.ndarray:
        return np.r_[self.scene.env.data.qpos, self.scene.env.data.qvel]


def build(settings: Mapping[str, Any]) -> MetaworldEnvironment:
    """settings: those of spec.py's `suites_for`, from which the worker has its suites too."""
    suites_for(settings)
    return MetaworldEnvironment(settings.get("start_jitter", START_JITTER))
