"""Drives Meta-World's own scripted policies as experts of its suites, and names the phase each is in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prts_core.io.errors import lookup, require
from prts_core.sim.suite import Environment, SuiteSpec, Task


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


class MetaworldExpert:
    """See prts_core.sim.suite.Expert. Phases only go forward; a hand pushed back is still at work."""

    noise_weights = (1.0, 1.0, 1.0, 0.0)  # the gripper is never shaken

    def __init__(self, task: str) -> None:
        require("metaworld", "sim")
        from metaworld.policies import ENV_POLICY_MAP

        kind: Any = ENV_POLICY_MAP[f"{task}-v3"]
        self.policy, self.phases = kind(), lookup(PHASES, task, "Meta-World task")
        self.reached, self.phase = 0, self.phases.sentences[0]

    def act(self, environment: Environment) -> np.ndarray:
        """(4,) float32 in [-1, 1]."""
        seen = environment.privileged()["observation"]
        self.reached = max(self.reached, self.phases.at(seen))
        self.phase = self.phases.sentences[self.reached]
        return np.clip(self.policy.get_action(seen), -1.0, 1.0).astype(np.float32)


def expert(suite: SuiteSpec, task: Task) -> MetaworldExpert:
    """The expert of one episode of `task`."""
    return MetaworldExpert(task.name)
