"""LIBERO as a worker drives it: any of its tasks, from a stored initial state, with two cameras that cost only a look.

It runs in the simulator's own Python.

What LIBERO computes is left as it is: its own step and its own success check, call by call (the self-check compares
states: 1e-14 apart after 20 steps, since the solver starts from another guess). What is left out computes nothing: the
observations of its own (25 updates a step) and the pictures nobody looks at. What an episode leaves behind is cleared,
since LIBERO itself builds the scene anew for every episode and we do not: the model's small arrays (poses of fixtures,
looks), the controller, the gripper's ramp, the solver's warm start.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError, UnavailableError, lookup
from prts_core.io.files import read_json
from prts_core.sim.lru import LruCache
from prts_core.sim.rendering import Renderer
from prts_core.sim.simulator_side import read_settings
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.suites.libero.perturb import Change
from prts_core.sim.suites.libero.privileged import Privileged

CAMERAS = {"observation.images.image": "agentview", "observation.images.wrist_image": "robot0_eye_in_hand"}
RENDER_SIZE = 256
KEPT = 3  # scenes: one takes some 3 s to build and 600 MB
COLLISION_GEOMS = 0  # the group of geoms that LIBERO does not draw
PLACEMENT_TRIES = 100
# What a reset, an affordance (a stove's flame) or a perturbation may change in a model; not its meshes and textures.
_RESTORED = ("body_", "geom_", "site_", "cam_", "light_", "mat_", "jnt_", "dof_")


Arrange = Callable[[Any, np.ndarray], np.ndarray]


class Scene:
    """One task's simulation, built once: LIBERO's environment object without observations and without a renderer."""

    def __init__(self, bddl_file: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # LIBERO and robosuite print; a worker's output is its own
            import robosuite
            from libero.libero.envs import TASK_MAPPING, bddl_utils
            from robosuite.utils.errors import RandomizationError

            problem = bddl_utils.get_problem_info(str(bddl_file))["problem_name"]
            self.env: Any = TASK_MAPPING[problem](
                str(bddl_file),
                robots=["Panda"],
                gripper_types="default",
                initialization_noise=None,
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                control_freq=20,
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                ignore_done=True,
                hard_reset=False,
            )
        self.env._observables = {}
        self._unplaceable = RandomizationError
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self._model_arrays = {
            name: value.copy()
            for name in dir(self.model)
            if name.startswith(_RESTORED) and isinstance(value := getattr(self.model, name), np.ndarray)
        }
        self._renderers: dict[int, Renderer] = {}
        self.painted: dict[int, np.ndarray] = {}  # textures that a perturbation changed, as they were
        self.privileged = Privileged(self.env)

    def reset(self, state: np.ndarray, seed: int, arrange: Arrange | None = None) -> None:
        """To one stored state (1 + nq + nv,). `seed` draws what LIBERO does not store: the fixtures' exact poses.
        `arrange(scene, state)`: another state to begin from, made after LIBERO placed its objects."""
        for name, value in self._model_arrays.items():
            np.copyto(getattr(self.model, name), value)
        np.random.seed(seed)  # LIBERO's samplers draw from numpy's global generator
        env = self.env
        for robot in env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._place()
        env.sim.set_state_from_flattened(state if arrange is None else arrange(self, state))
        env.sim.forward()
        env._check_success()
        env._post_process()

    def _place(self) -> None:
        for _ in range(PLACEMENT_TRIES):
            try:
                self.env.reset()
                return
            except self._unplaceable:
                continue
        raise ConfigError("LIBERO finds no room for a task's objects", field="task", found=self.env.bddl_file_name)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        _, reward, success, _ = self.env.step(action)
        return float(reward), bool(success)

    def place_cameras(self) -> None:
        """Cameras and lamps go where the model has them, without a step of physics."""
        import mujoco

        mujoco.mj_camlight(self.model, self.data)

    def picture(self, camera: str, size: int) -> np.ndarray:
        """(size, size, 3) uint8, turned by 180 degrees as every policy for LIBERO is shown it."""
        if size not in self._renderers:
            self._renderers[size] = Renderer(self.model, size, (COLLISION_GEOMS,))
        # robosuite hands out OpenGL's rows from the bottom up; the published policies turn that by 180 degrees.
        turned = self._renderers[size](self.data, self.env.sim.model.camera_name2id(camera))[::-1, ::-1]
        return np.ascontiguousarray(turned)

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self.env = self.model = self.data = None
        del self.privileged
        gc.collect()  # robosuite's objects hold each other


class LiberoEnvironment:
    """`prts_core.sim.suite.Environment` for all of LIBERO's tasks.

    home: where the simulator is installed (tasks.json, init_states/, config/). tasks: how many scenes are kept built.
    image_size: of the pictures, in place of the suite's; for measurements and demonstrations, since the suite's
    contract is then not kept. drawn: episodes begin where LIBERO's own sampler puts things, the arm as robosuite's
    default noise has it, and not in a stored state: for demonstrations.
    """

    def __init__(self, home: Path, tasks: int = KEPT, image_size: int | None = None, drawn: bool = False) -> None:
        self.home, self._image_size, self._drawn = home, image_size, drawn
        self._catalogue = read_json(home / "tasks.json")["tasks"]
        self._scenes = LruCache(Scene, tasks, Scene.close)
        self._states: dict[str, np.ndarray] = {}
        self._scene: Scene | None = None
        self._change = Change(Task("", "", 0, 0))
        self._image_sizes: dict[str, int] = {}

    def bddl_file(self, task: str) -> Path:
        """Where LIBERO describes a task's scene and goal."""
        return Path(self._bddl_folder) / self._entry(task)["folder"] / f"{task}.bddl"

    @cached_property
    def _bddl_folder(self) -> str:
        os.environ["LIBERO_CONFIG_PATH"] = str(self.home / "config")  # without one LIBERO asks on stdin
        from libero.libero import get_libero_path

        return get_libero_path("bddl_files")

    def _entry(self, name: str) -> dict[str, Any]:
        return lookup(self._catalogue, name, "LIBERO task")

    def initial_states(self, task: str) -> np.ndarray:
        """(N, 1 + nq + nv) float64, held against the digest that was taken when they were converted."""
        if task not in self._states:
            entry = self._entry(task)
            path = self.home / "init_states" / entry["folder"] / f"{task}.npz"
            with np.load(path) as file:
                states = file["states"]
            if states_digest(states) != entry["digest"]:
                raise UnavailableError(
                    "A file of initial states was changed",
                    file=path,
                    expected=entry["digest"],
                    cure="prts sim remove libero, then prts sim install libero",
                )
            self._states[task] = states
        return self._states[task]

    def reset(self, suite: SuiteSpec, task: Task, initial_state: int, seed: int) -> None:
        """Initial state `initial_state` of the task, then the suite's settling. Equal arguments give equal bits."""
        change = Change(task)
        change.expect(self._entry(change.base)["instruction"])
        states = self.initial_states(change.base)
        if not 0 <= initial_state < len(states):
            raise ConfigError(
                "There is no such initial state",
                field="initial_state",
                found=initial_state,
                expected=f"0 to {len(states) - 1} for {change.base}",
            )
        cameras = {camera.key: self._image_size or camera.height for camera in suite.contract.cameras}
        for key in cameras:
            lookup(CAMERAS, key, "camera of LIBERO")
        self._image_sizes = cameras
        episode = _placement_seed(change.base, initial_state, seed)
        self._scene = self._scenes(change.description(self.bddl_file(change.base), self.home / "perturbed"))
        self._change = change
        arrange = change.arrange if change.rearranges else as_drawn if self._drawn else None
        self._scene.reset(states[initial_state], episode, arrange)
        change.begin(self._scene, episode)
        for _ in range(suite.settle_steps):
            self._scene.step(np.asarray(suite.settle_action, np.float64))

    @property
    def scene(self) -> Scene:
        assert self._scene is not None, "reset comes first"
        return self._scene

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """One control step (50 ms) of a (7,) action, which is clipped to -1 to 1; (reward, LIBERO's success)."""
        return self.scene.step(np.asarray(action, np.float64))

    def proprioception(self) -> np.ndarray:
        """(8,) float32: hand position 3 (m), its rotation as axis-angle 3 (rad), both fingers 2 (m)."""
        env, robot = self.scene.env, self.scene.env.robots[0]
        position = env.sim.data.site_xpos[robot.eef_site_id]
        rotation = axis_angle(env.sim.data.get_body_xquat(robot.robot_model.eef_name))
        return np.r_[position, rotation, env.sim.data.qpos[robot._ref_gripper_joint_pos_indexes]].astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        seen = {key: self.scene.picture(CAMERAS[key], size) for key, size in self._image_sizes.items()}
        return self._change.pictures(seen, int(self.scene.env.timestep))

    def render(self) -> np.ndarray:
        """(256, 512, 3): both cameras side by side."""
        return np.concatenate([self.scene.picture(camera, RENDER_SIZE) for camera in CAMERAS.values()], axis=1)

    def privileged(self) -> dict[str, Any]:
        """What only an expert may see; see privileged.py."""
        return self.scene.privileged()

    def state(self) -> np.ndarray:
        """(1 + nq + nv,) float64: time, positions, velocities, as LIBERO stores its initial states."""
        return self.scene.env.sim.get_state().flatten()


def as_drawn(scene: Scene, stored: np.ndarray) -> np.ndarray:
    """(1 + nq + nv,) the state LIBERO's sampler made, the arm's joints off by robosuite's default noise (0.02 rad)."""
    positions = np.array(scene.data.qpos)
    joints = scene.env.robots[0]._ref_joint_pos_indexes
    positions[joints] += np.random.normal(0.0, 0.02, len(joints))  # seeded by Scene.reset
    return np.r_[0.0, positions, np.zeros_like(scene.data.qvel)]


def build(settings: Mapping[str, Any]) -> LiberoEnvironment:
    """settings: see `read_settings`."""
    from prts_core.sim.installations import Installation

    tasks, size, placement = read_settings("LIBERO", settings, KEPT)
    home = Installation("libero")
    home.require()
    return LiberoEnvironment(home.path, tasks, size, placement == "drawn")


def axis_angle(wxyz: np.ndarray) -> np.ndarray:
    """(3,) axis times angle of a quaternion, as LIBERO's demonstrations have it: the angle is in [0, 2 pi], so that a
    hand that points down does not jump between pi and -pi."""
    w = float(np.clip(wxyz[0], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(wxyz[1:], np.float64) * 2.0 * np.arccos(w) / sine


def states_digest(states: np.ndarray) -> str:
    return "sha256:" + hashlib.sha256(np.ascontiguousarray(states, "<f8").tobytes()).hexdigest()


def _placement_seed(task: str, initial_state: int, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{task} {initial_state} {seed}".encode()).digest()[:4], "little")
