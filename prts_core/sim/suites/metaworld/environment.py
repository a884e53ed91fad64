"""Meta-World as a worker drives it: any task of its suites, one episode at a time.

The simulation itself is sim/metaworld.py, the one that the quickstart's demonstrations come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.sim.keep import Keep
from prts_core.sim.metaworld import MetaworldEnv
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.suites.metaworld.spec import SIMULATOR_HZ, START_JITTER, suites_for

KEPT = 6  # environments; one takes 100 MB and more with its renderer, and half a second to build


class MetaworldEnvironment:
    """See prts_core.sim.suite.Environment. Reward: 1 where the task's own success flag is raised, else 0.

    perturbation: `start_jitter`, centimetres, in place of the suite's.
    """

    def __init__(self, start_jitter: int = START_JITTER) -> None:
        self.start_jitter = start_jitter
        self.environments = Keep(self._build, KEPT)
        self.current: MetaworldEnv | None = None
        self.cameras: dict[str, str] = {}

    def _build(self, key: tuple[str, int, int]) -> MetaworldEnv:
        task, size, repeat = key
        return MetaworldEnv(task, image_size=size, action_repeat=repeat)

    @property
    def env(self) -> MetaworldEnv:
        assert self.current is not None, "reset comes first"
        return self.current

    def reset(self, suite: SuiteSpec, task: Task, initial_state: int, seed: int) -> None:
        unknown = set(task.perturbation) - {"start_jitter"}
        if unknown:
            raise ConfigError(
                "Meta-World has no such perturbation", field="perturbation", found=min(unknown), expected="start_jitter"
            )
        repeat = round(SIMULATOR_HZ / suite.contract.control_hz)
        self.current = self.environments((task.name, suite.contract.cameras[0].height, repeat))
        self.current.start_jitter = int(task.perturbation.get("start_jitter", self.start_jitter))
        self.cameras = {camera.key.rsplit(".", 1)[-1]: camera.key for camera in suite.contract.cameras}
        self.current.reset(seed + initial_state)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        success = self.env.step(action)
        return float(success), success

    def proprioception(self) -> np.ndarray:
        return self.env.proprioception()

    def images(self) -> dict[str, np.ndarray]:
        return {self.cameras[name]: picture for name, picture in self.env.images().items()}

    def film(self) -> np.ndarray:
        return self.env.film()

    def privileged(self) -> dict[str, Any]:
        return {"observation": self.env.privileged()}

    def state(self) -> np.ndarray:
        return self.env.simulator_state()


def make(settings: Mapping[str, Any]) -> MetaworldEnvironment:
    """settings: those of spec.py's `suites_for`, from which the worker has its suites too."""
    suites_for(settings)
    return MetaworldEnvironment(settings.get("start_jitter", START_JITTER))
