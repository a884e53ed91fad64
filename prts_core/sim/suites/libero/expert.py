"""LIBERO's scripted expert: the skills of a goal one after another, in OSC_POSE actions, with words for subtasks.

Files: expert_plan.py says which skills, expert_carry.py and expert_joints.py are the skills, expert_grasp.py where they
take hold, expert_scene.py what they see of the scene.
"""

from __future__ import annotations

import numpy as np

from prts_core.sim.suite import Environment, SuiteSpec, Task
from prts_core.sim.suites.libero.expert_motion import Skill
from prts_core.sim.suites.libero.expert_plan import skills_of
from prts_core.sim.suites.libero.expert_scene import ExpertScene


class LiberoExpert:
    """See prts_core.sim.suite.Expert. The goals of a task one after another, each again where it comes undone."""

    noise_weights = (1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.0)

    def __init__(self) -> None:
        self.skills: list[Skill] | None = None
        self.current: Skill | None = None
        self.phase = ""

    def act(self, environment: Environment) -> np.ndarray:
        scene = ExpertScene(environment.privileged())
        if self.skills is None:
            self.skills = skills_of(scene)
        undone = next((skill for skill in self.skills if not skill.done(scene)), self.skills[-1])
        if self.current is None or not self.current.busy:
            self.current = undone
        chosen = self.current.act(scene)
        self.phase = self.current.phase
        return chosen


def expert(suite: SuiteSpec, task: Task) -> LiberoExpert:
    """The expert of one episode."""
    return LiberoExpert()
