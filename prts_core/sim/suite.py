"""What a simulation suite is: its tasks and its protocol as data, and the environment that a worker process drives.

A family of suites is a package `prts_core.sim.suites.<family>` with the same files each: `spec.py` (`suites()`: data
only, importable without the simulator; `suites_for(settings)` where settings of the workers make another protocol),
`environment.py` (`build(settings) -> Environment`, runs in the worker), `install.py` (`install(home, assets) -> record`
builds the simulator's own environment and writes the record, `check(home) -> report`; MAIN_ENVIRONMENT where there is
nothing to build) and `expert.py` (`expert(suite, task) -> Expert`; a task without one is a SimulatorError); and
`layout.py` where its demonstrations have names of their own in HDF5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from prts_core.contract import Contract

# Plain values, {axis: its settings}: it travels to the worker and into every row of results. BASE names the base task.
Perturbation = Mapping[str, Any]
BASE = "base"


def axis_of(perturbation: Perturbation) -> str:
    """Along what a task differs from its base task: "camera", "camera + noise", or "" where it does not."""
    return " + ".join(name for name in perturbation if name != BASE)


@dataclass(frozen=True)
class Task:
    """name: the simulator's own. initial_states: how many it ships; 0 where a reset draws one from its seed.

    max_steps: of the simulator's control steps, settling not counted. perturbation: what differs from the base task.
    """

    name: str
    instruction: str
    initial_states: int
    max_steps: int
    perturbation: Perturbation = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteSpec:
    """A suite's protocol: two results are comparable only where all of this is equal.

    contract: what state and action mean here, and the cameras with their size. settle_steps: steps of `settle_action`
    after a reset, before the first look. image_rotation: degrees that rendered pictures were turned by already.
    episodes_per_task: of the published protocol. standins: labels every result made on assets that are not the
    suite's own; empty for the real ones.
    """

    name: str
    family: str
    tasks: tuple[Task, ...]
    contract: Contract
    settle_steps: int
    settle_action: tuple[float, ...]
    image_rotation: int
    episodes_per_task: int
    seed: int
    source: str
    standins: str = ""


@dataclass(frozen=True)
class EpisodeKey:
    """Which episode: two runs of one key start from the same simulator state to the bit, in whatever process."""

    suite: str
    task: str
    initial_state: int
    seed: int


class Environment(Protocol):
    """One simulator in one process, for any task of its family: what the worker calls, one episode at a time.

    `reset` settles as the suite says. `step` is one control step: (reward, success). `images` renders, nothing else
    does: {camera key of the contract: (H, W, 3) uint8}, upright. `render`: (H, W, 3) uint8 for people. `privileged`:
    what only a scripted expert may see. `state`: the whole simulator state, (n,) float64.
    """

    def reset(self, suite: SuiteSpec, task: Task, initial_state: int, seed: int) -> None: ...

    def step(self, action: np.ndarray) -> tuple[float, bool]: ...

    def proprioception(self) -> np.ndarray: ...

    def images(self) -> dict[str, np.ndarray]: ...

    def render(self) -> np.ndarray: ...

    def privileged(self) -> dict[str, Any]: ...

    def state(self) -> np.ndarray: ...


class Expert(Protocol):
    """A scripted expert of one episode. `act`: (A,) float32 in the suite's action convention; `phase`: what it is
    doing, in words, for subtasks. `noise_weights`: (A,) how strongly noise pushes each dimension; 0 for the gripper."""

    phase: str
    noise_weights: Sequence[float]

    def act(self, environment: Environment) -> np.ndarray: ...
