"""A suite of dots that must reach a place, its workers in this process, and policies for it: for tests of the runner.

Workers answer in an order drawn from a seed and die where they are told to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.policy.observation import STATE, TwoSteps
from prts_core.sim import protocol
from prts_core.sim.adapter import adapt
from prts_core.sim.pool import WorkerLost, WorkerRefused
from prts_core.sim.suite import EpisodeKey, SuiteSpec, Task

CAMERA = "observation.images.top"
XY = (Dimension("x", "m"), Dimension("y", "m"))
CONTRACT = Contract("dot", 10, XY, XY, (Camera(CAMERA, "Camera top", 8, 8),))
TASKS = tuple(Task(name, f"go {name}", 5, 24) for name in ("left", "right", "up"))
SUITE = SuiteSpec("dots", "dots", TASKS, CONTRACT, 0, (0.0, 0.0), 0, 4, 7, "tests")
GOALS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, 1.0)}
CHUNK = 8
SAME = adapt(CONTRACT, CONTRACT)  # of a policy that means what the suite means


@dataclass
class DotPolicy(TwoSteps):
    """Goes where the sentence says, as well as its noise lets it; the noise is drawn from the seeds it is given."""

    noise: float = 0.25
    mixes: float = 0.0  # how far a sample's answer depends on its neighbours
    asked: list[int] = field(default_factory=list)
    contract: PolicyContract = field(
        default_factory=lambda: PolicyContract("dot", CONTRACT, CHUNK, "QUANTILE", "sha256:x")
    )

    def act(self, observation, instruction, seeds) -> np.ndarray:
        state = observation[STATE]
        self.asked.append(len(state))
        goals = np.array([GOALS[text.split()[-1]] for text in instruction])
        noise = np.stack([np.random.default_rng(seed).normal(0, self.noise, (CHUNK, 2)) for seed in seeds])
        aim = (goals - state)[:, None] / CHUNK
        return (aim + noise + self.mixes * state.mean()).astype(np.float32)

    def value(self, observation, actions, instruction) -> np.ndarray:
        goals = np.array([GOALS[text.split()[-1]] for text in instruction])
        return -np.linalg.norm(goals - observation[STATE], axis=1)


class ToySlots:
    """See prts_core.rollout.runner.Slots. dies: (key, number of the message since its reset) -> is the worker lost
    there? looks: how often anything was rendered. skills: tasks that an expert can do."""

    def __init__(
        self,
        slots: int,
        order: int = 0,
        dies: Callable[[EpisodeKey, int], bool] = lambda key, n: False,
        skills: tuple[str, ...] = tuple(GOALS),
    ):
        self.slots, self.lost, self.looks, self.dies, self.skills = slots, 0, 0, dies, skills
        self.random = random.Random(order)
        self.due: dict[int, dict[str, Any]] = {}
        self.at: dict[int, np.ndarray] = {}
        self.keys: dict[int, EpisodeKey] = {}
        self.count: dict[int, int] = {}
        self.resets: list[EpisodeKey] = []

    def send(self, slot: int, message: dict[str, Any]) -> None:
        assert slot not in self.due, "one message a slot"
        self.due[slot] = message

    def wait(self, timeout: float | None = None) -> tuple[int, dict[str, Any] | WorkerLost] | None:
        assert self.due, "nothing is under way"
        if timeout is not None and self.random.random() < 0.3:
            return None
        slot = self.random.choice(sorted(self.due))
        message = self.due.pop(slot)
        if message["kind"] in protocol.BEGINS:
            key = EpisodeKey(*(message[name] for name in ("suite", "task", "initial_state", "seed")))
            self.keys[slot], self.count[slot] = key, 0
            self.resets.append(key)
            self.at[slot] = np.random.default_rng([key.initial_state, key.seed]).normal(0, 0.2, 2)
        self.count[slot] += 1
        if self.dies(self.keys[slot], self.count[slot]):
            self.lost += 1
            return slot, WorkerLost("lost for a test")
        answers = {"reset": self._reset, "step": self._step, "demonstrate": self._demonstrate}
        return slot, answers[message["kind"]](slot, message)

    def _see(self, slot: int, wanted: bool) -> dict[str, np.ndarray] | None:
        self.looks += wanted
        picture = np.full((8, 8, 3), int(abs(self.at[slot][0]) * 100) % 256, np.uint8)
        return {STATE: self.at[slot].astype(np.float32), CAMERA: picture} if wanted else None

    def _reset(self, slot: int, message: dict[str, Any]) -> dict[str, Any]:
        return {
            "kind": "reset",
            "observation": self._see(slot, True),
            "frame": None,
            "instruction": f"go {self.keys[slot].task}",
        }

    def _demonstrate(self, slot: int, message: dict[str, Any]) -> dict[str, Any]:
        task = self.keys[slot].task
        if task not in self.skills:
            refused = WorkerRefused("refused for a test", found=f"nobody can go {task}")
            refused.slot = slot
            raise refused
        way = np.repeat([np.array(GOALS[task]) - self.at[slot]], message["max_steps"], axis=0).astype(np.float32) / 8
        done = self._step(slot, {"actions": way, "observe": False})
        reached = done["steps"] - 1 if done["successes"].any() else None
        return {"kind": "demonstrate", "executed": way, "success_row": reached, "instruction": f"go {task}"}

    def _step(self, slot: int, message: dict[str, Any]) -> dict[str, Any]:
        successes = []
        for action in message["actions"]:
            self.at[slot] = self.at[slot] + action
            successes.append(bool(np.linalg.norm(self.at[slot] - GOALS[self.keys[slot].task]) < 0.25))
            if successes[-1]:
                break
        return {
            "kind": "step",
            "rewards": np.array(successes, np.float32),
            "successes": np.array(successes),
            "steps": len(successes),
            "observation": self._see(slot, message["observe"]),
            "frames": None,
        }
