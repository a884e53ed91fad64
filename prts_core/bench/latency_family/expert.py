"""There is no expert of waiting."""

from __future__ import annotations

from prts_core.io.errors import SimulatorError
from prts_core.sim.suite import Expert, SuiteSpec, Task


def expert(suite: SuiteSpec, task: Task) -> Expert:
    raise SimulatorError("A task has no scripted expert", field="task", found=task.name)
