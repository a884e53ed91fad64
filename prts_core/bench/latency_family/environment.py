"""Waits: every step sleeps for as long as it was told to, and takes no processor while it does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from prts_core.bench.latency_family.spec import CAMERA, SIZE, suites_for
from prts_core.sim.suite import SuiteSpec, Task


class Latency:
    """See prts_core.sim.suite.Environment. Its state is the number of steps taken."""

    def __init__(self, step_s: float) -> None:
        self.step_s, self.taken, self.last = step_s, 0, 0

    def reset(self, suite: SuiteSpec, task: Task, initial_state: int, seed: int) -> None:
        self.taken, self.last = 0, task.max_steps

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        time.sleep(self.step_s)
        self.taken += 1
        return float(self.taken >= self.last), self.taken >= self.last

    def proprioception(self) -> np.ndarray:
        return np.full(2, self.taken / max(1, self.last), np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {CAMERA: np.full((SIZE, SIZE, 3), self.taken % 256, np.uint8)}

    def render(self) -> np.ndarray:
        return self.images()[CAMERA]

    def privileged(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def state(self) -> np.ndarray:
        return np.array([self.taken], np.float64)


def build(settings: Mapping[str, Any]) -> Latency:
    """settings: `step_s`, seconds a step (0), and those of spec.py."""
    suites_for(settings)
    return Latency(settings.get("step_s", 0.0))
