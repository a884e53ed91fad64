"""Meta-World's own scripted policies as experts of its suites."""

from __future__ import annotations

import numpy as np

from prts_core.sim.metaworld import ScriptedExpert
from prts_core.sim.suite import Environment, SuiteSpec, Task
from prts_core.sim.suites.metaworld.environment import MetaworldEnvironment


class MetaworldExpert:
    """See prts_core.sim.suite.Expert. Phases only go forward; a hand pushed back is still at work."""

    noise_weights = (1.0, 1.0, 1.0, 0.0)  # the gripper is never shaken

    def __init__(self, task: str) -> None:
        self.scripted = ScriptedExpert(task)
        self.reached, self.phase = 0, self.scripted.phases.sentences[0]

    def act(self, environment: Environment) -> np.ndarray:
        assert isinstance(environment, MetaworldEnvironment)
        self.reached = max(self.reached, self.scripted.phases.at(environment.env.privileged()))
        self.phase = self.scripted.phases.sentences[self.reached]
        return self.scripted.act(environment.env)


def expert(suite: SuiteSpec, task: Task) -> MetaworldExpert:
    """The expert of one episode of `task`."""
    return MetaworldExpert(task.name)
