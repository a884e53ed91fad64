"""Suite `latency`: one task, solved by its last step. It imports no simulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prts_core.contract import Camera, Contract, Dimension
from prts_core.io.errors import ConfigError
from prts_core.sim.suite import SuiteSpec, Task

CAMERA = "observation.images.eye"
SIZE = 16  # pixels
STEPS = 40  # an episode
FIELDS = ("step_s", "steps")

CONTRACT = Contract(
    embodiment="latency",
    control_hz=10.0,
    state=(Dimension("x", "m"), Dimension("y", "m")),
    action=(Dimension("dx", "m"), Dimension("dy", "m")),
    cameras=(Camera(CAMERA, "Eye", SIZE, SIZE),),
)


def suites() -> dict[str, SuiteSpec]:
    return suites_for({})


def suites_for(settings: Mapping[str, Any]) -> dict[str, SuiteSpec]:
    """settings: `steps` of an episode; `step_s`, seconds that a step takes, is the environment's. ConfigError for
    anything else."""
    for name, value in settings.items():
        if name not in FIELDS or not isinstance(value, int | float) or value < 0:
            raise ConfigError(
                "The waiting simulator has no such setting",
                field=name,
                found=value,
                expected=f"{', '.join(FIELDS)}; 0 or more",
            )
    task = Task("wait", "wait a while", 0, int(settings.get("steps", STEPS)))
    family = __name__.rpartition(".")[0]
    return {"latency": SuiteSpec("latency", family, (task,), CONTRACT, 0, (0.0, 0.0), 0, 5, 7, "made up")}
