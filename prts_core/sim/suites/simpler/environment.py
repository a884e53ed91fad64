"""SimplerEnv as a worker drives it: any of its WidowX tasks by episode id, drawn only when somebody looks.

It runs in the simulator's own Python.

Scenes, controller and success check are ManiSkill's own. What is left out computes nothing: the pictures that its loop
draws at every step. A policy of the Bridge data speaks another language than ManiSkill, and the translation is here:
turns as roll, pitch, yaw; the hand's attitude from pointing straight down; a gripper from 0 to 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from prts_core.io.errors import ConfigError, UnavailableError, lookup
from prts_core.sim.lru import LruCache
from prts_core.sim.simulator_side import read_settings
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.suites.simpler.assets import missing
from prts_core.sim.suites.simpler.spec import CAMERA, FAMILY, GRIPPER_SWITCH, TASKS

VIEW = "3rd_view_camera"
RENDER_SIZE = (320, 240)  # width, height
KEPT = 4  # scenes
# The Bridge robot's software counts turns from the hand pointing down; its axes in those of the hand.
POINTING_DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])


class Scene:
    """One task's simulation, built once."""

    def __init__(self, task: str) -> None:
        from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import put_on_in_scene

        kind: Any = getattr(put_on_in_scene, TASKS[task].environment)
        # Lists of the base class that every scene of a process would otherwise share and add to.
        kind._rgb_overlay_images, kind._objects_to_remove_from_greenscreen = {}, []
        self.env: Any = kind(
            obs_mode="rgb+segmentation",
            num_envs=1,
            sim_backend="physx_cpu",
            render_backend="cpu",
            reconfiguration_freq=0,
        )
        self.env.get_obs = lambda *args, **kwargs: {}  # its steps draw pictures nobody looks at
        self.names = dict(zip(("carried", "target"), TASKS[task].models, strict=False))

    def reset(self, episode: int, seed: int) -> None:
        self.env.reset(seed=seed, options={"episode_id": episode})

    def step(self, action: np.ndarray) -> bool:
        """One control step of ManiSkill's action: metres, angles about x y z in turn, gripper 1 open to -1 closed."""
        return bool(self.env.step(action)[4]["success"][0])

    def picture(self) -> np.ndarray:
        """(480, 640, 3) uint8, the background replaced by the photograph."""
        return self.env._get_obs_sensor_data()[VIEW]["rgb"][0].numpy()

    @property
    def robot(self) -> Any:
        return self.env.agent.robot

    def pose(self, thing: Any) -> tuple[np.ndarray, np.ndarray]:
        """((3,) position, (3, 3) rotation) of a link or object, from the robot's base, along its axes."""
        origin, turn = _pose(self.robot.links_map["base_link"].pose)
        position, rotation = _pose(thing.pose)
        return turn.T @ (position - origin), turn.T @ rotation

    def opening(self) -> float:
        """1 for a gripper at its widest, 0 closed; less than 0 where it is pressed beyond."""
        limits = self.robot.get_qlimits()[0, -2:].numpy().astype(np.float64)  # (2, 2)
        fingers = self.robot.get_qpos()[0, -2:].numpy().astype(np.float64)
        return 1.0 - max(float(((limits[:, 1] - fingers) / (limits[:, 1] - limits[:, 0])).mean()), 0.0)

    def close(self) -> None:
        self.env.close()


class SimplerEnvironment:
    """`prts_core.sim.suite.Environment` for SimplerEnv's WidowX tasks.

    home: where the simulator is installed (assets). tasks: how many scenes are kept built. image_size: of the pictures,
    squeezed to a square, in place of the suite's 480 x 640.
    """

    def __init__(self, home: Path, tasks: int = KEPT, image_size: int | None = None) -> None:
        self.home, self._image_size = home, image_size
        self._scenes: LruCache[str, Scene] = LruCache(self._build, tasks, Scene.close)
        self._scene: Scene | None = None
        self._size, self._left = (0, 0), 0

    def _build(self, task: str) -> Scene:
        if (file := missing(self.home / "assets", task)) is not None:  # ManiSkill would ask on stdin
            raise UnavailableError(
                f"The assets of {task} are not all there",
                file=self.home / "assets" / file,
                found="missing",
                cure="prts sim install simpler --assets FOLDER",
            )
        return Scene(task)

    def reset(self, suite: SuiteSpec, task: Task, initial_state: int, seed: int) -> None:
        """Episode id `initial_state`: where things lie and how they are turned. Equal arguments give equal bits."""
        if task.perturbation:
            raise ConfigError(
                "SimplerEnv has no such perturbation",
                field="perturbation",
                found=min(task.perturbation),
                expected="none",
            )
        lookup(TASKS, task.name, "task of SimplerEnv")
        (camera,) = suite.contract.cameras
        self._scene = self._scenes(task.name)
        square = self._image_size
        self._size = (camera.width, camera.height) if square is None else (square, square)
        self._left = task.max_steps
        self._scene.reset(initial_state, seed)

    @property
    def scene(self) -> Scene:
        assert self._scene is not None, "reset comes first"
        return self._scene

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """One control step (0.2 s) of a (7,) action: (1 where ManiSkill's check holds now, that at the last step).

        SimplerEnv judges an episode by its last step: what touched its goal and fell off again is no success."""
        action = np.asarray(action, np.float64)
        gripper = 1.0 if action[6] > GRIPPER_SWITCH else -1.0
        holds = self.scene.step(np.r_[action[:3], controller_angles(action[3:6]), gripper].astype(np.float32))
        self._left -= 1
        return float(holds), holds and self._left <= 0

    def proprioception(self) -> np.ndarray:
        """(7,) float32: hand from the base (m), roll, pitch, yaw from pointing down (rad), gripper (1 open)."""
        position, rotation = self.scene.pose(self.scene.robot.links_map["ee_gripper_link"])
        return np.r_[position, rpy_of(rotation @ POINTING_DOWN.T), self.scene.opening()].astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        """{camera: (H, W, 3) uint8} upright, squeezed where another size was asked for."""
        return {CAMERA: _squeezed(self.scene.picture(), self._size)}

    def render(self) -> np.ndarray:
        """(240, 320, 3): the same camera."""
        return _squeezed(self.scene.picture(), RENDER_SIZE)

    def privileged(self) -> dict[str, Any]:
        """Poses in the base's frame, each ((3,) m, (3, 3)): `goal`, where the controller wants the hand; `hand`;
        `carried` and `target`, the task's two things. `opening`: of the gripper."""
        scene = self.scene
        goal = scene.env.agent.controller.controllers["arm"]._target_pose
        return {
            "goal": _pose(goal),
            "hand": scene.pose(scene.robot.links_map["ee_gripper_link"]),
            "opening": scene.opening(),
            **{role: scene.pose(scene.env.objs[name]) for role, name in scene.names.items()},
        }

    def state(self) -> np.ndarray:
        """(n,) float64: poses and velocities of all bodies, joints, and where the controller wants the hand."""
        return self.scene.env.get_state()[0].numpy().astype(np.float64)


def build(settings: Mapping[str, Any]) -> SimplerEnvironment:
    """settings: see `read_settings`; no placement but "stored", since ManiSkill's own sampler draws from the suite's 24
    episodes too."""
    from prts_core.sim.installations import Installation

    cure = "--placement stored, and do not evaluate on the same episodes"
    tasks, size, _ = read_settings("SimplerEnv", settings, KEPT, ("stored",), cure)
    home = Installation(FAMILY)
    home.require()
    import_simulator(home.path)
    return SimplerEnvironment(home.path, tasks, size)


def import_simulator(home: Path) -> None:
    """Now and not at the first reset, since it takes longer than any; where assets lie is read at import."""
    os.environ["MS_ASSET_DIR"] = str(home / "assets")
    import mani_skill.envs  # noqa: F401


def controller_angles(rpy: np.ndarray) -> np.ndarray:
    """(3,) angles a, b, c with Rx(a) Ry(b) Rz(c) = Rz(yaw) Ry(pitch) Rx(roll): what ManiSkill 3's controller reads."""
    return Rotation.from_euler("xyz", rpy).as_euler("XYZ")


def matrix_of(rpy: np.ndarray) -> np.ndarray:
    """(3, 3) Rz(yaw) Ry(pitch) Rx(roll)."""
    return Rotation.from_euler("xyz", rpy).as_matrix()


def rpy_of(turn: np.ndarray) -> np.ndarray:
    """(3,) roll, pitch, yaw of a rotation; the inverse of `matrix_of` for pitches within a right angle."""
    return Rotation.from_matrix(turn).as_euler("xyz")


def _pose(pose: Any) -> tuple[np.ndarray, np.ndarray]:
    """((3,), (3, 3)) float64 of a batch of one."""
    x, y, z, *quaternion = pose.raw_pose[0].numpy().astype(np.float64)
    return np.array([x, y, z]), Rotation.from_quat(quaternion, scalar_first=True).as_matrix()


def _squeezed(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A (H, W, 3) picture at size (width, height)."""
    if size == (picture.shape[1], picture.shape[0]):
        return np.ascontiguousarray(picture)
    import cv2

    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
