"""Closed-loop episodes in Meta-World: many at once in step, one result a job. Knows no statistics and no files.

A job says everything an episode depends on; policy noise is drawn from (seed, row), so that a job's result does not
depend on
which other jobs run beside it (up to floating-point batching).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prts_core.config.schema import MetaworldSource
from prts_core.evaluation.actors import ActsOnImages
from prts_core.evaluation.recording import Tape
from prts_core.observation import STATE
from prts_core.sim.metaworld import CAMERAS, MetaworldEnv, ScriptedExpert


@dataclass(frozen=True)
class Job:
    """One episode. controller: policy, expert or replay. instruction: the sentence the policy is given.

    noise: standard deviation added to executed xyz actions; black: images are zeros; max_steps: simulator steps.
    """

    condition: str
    task: str
    instruction: str
    seed: int
    max_steps: int
    controller: str = "policy"
    black: bool = False
    noise: float = 0.0
    score_value: bool = False
    film: bool = False
    record: bool = False


@dataclass
class Outcome:
    """steps: simulator steps until success or the limit. values: (row, value) at every look of the policy. tape: all
    that happened, of jobs that are recorded."""

    job: Job
    success: bool = False
    steps: int = 0
    latency_ms: float = 0.0
    values: list[tuple[int, float]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    tape: Tape | None = None


class Arena:
    """Environments of one task, reused from episode to episode."""

    def __init__(self, task: str, count: int, source: MetaworldSource) -> None:
        self.envs = [MetaworldEnv.of(task, source) for _ in range(count)]
        self.expert = ScriptedExpert(task)
        self.action_repeat = source.action_repeat

    def run(
        self, jobs: list[Job], *, execute: int, policy: ActsOnImages | None = None, replay: np.ndarray | None = None,
        on_done: Callable[[Outcome], None] | None = None,
    ) -> list[Outcome]:  # fmt: skip
        """Run all jobs, as many at once as there are environments. Jobs of one call share their policy."""
        out = []
        for start in range(0, len(jobs), len(self.envs)):
            out += self._run_together(jobs[start : start + len(self.envs)], execute, policy, replay)
            if on_done is not None:
                for outcome in out[start:]:
                    on_done(outcome)
        return out

    def _run_together(
        self, jobs: list[Job], execute: int, policy: ActsOnImages | None, replay: np.ndarray | None
    ) -> list[Outcome]:
        lanes = [_Lane(job, env) for job, env in zip(jobs, self.envs, strict=False)]
        for lane in lanes:
            lane.env.reset(lane.job.seed)
        row = 0
        while active := [lane for lane in lanes if not lane.finished(self.action_repeat)]:
            looking = [lane for lane in active if lane.job.controller == "policy"]
            if row % execute == 0 and looking:
                self._look(looking, policy, row)
            for lane in active:
                lane.step(lane.action(row, execute, self.expert, replay))
            row += 1
        return [lane.outcome for lane in lanes]

    @staticmethod
    def _look(lanes: list[_Lane], policy: ActsOnImages | None, row: int) -> None:
        assert policy is not None, "jobs with controller='policy' need a policy"
        seen = observe([lane.env for lane in lanes], [lane.job.black for lane in lanes])
        instructions = [lane.job.instruction for lane in lanes]
        begin = time.perf_counter()
        chunks = policy.act(seen, instructions, [noise_seed(lane.job.seed, row) for lane in lanes])
        latency = (time.perf_counter() - begin) * 1e3
        scored = [i for i, lane in enumerate(lanes) if lane.job.score_value]
        if scored:
            some = {key: array[scored] for key, array in seen.items()}
            values = policy.value(some, chunks[scored], [instructions[i] for i in scored])
            for i, value in zip(scored, values, strict=True):
                lanes[i].outcome.values.append((row, float(value)))
        for lane, chunk in zip(lanes, chunks, strict=True):
            lane.chunk, lane.outcome.latency_ms = chunk, max(lane.outcome.latency_ms, latency)
            if lane.job.film:
                lane.outcome.frames.append(lane.env.film())


def observe(envs: list[MetaworldEnv], black: list[bool]) -> dict[str, np.ndarray]:
    """What a policy sees of several environments: images by contract key (B, S, S, 3), proprioception (B, 4)."""
    pictures = [env.images() for env in envs]
    images = {
        f"observation.images.{camera}": np.stack(
            [np.zeros_like(p[camera]) if dark else p[camera] for p, dark in zip(pictures, black, strict=True)]
        )
        for camera in CAMERAS
    }
    return images | {STATE: np.stack([env.proprioception() for env in envs])}


def noise_seed(seed: int, row: int) -> int:
    return zlib.crc32(f"{seed}:{row}".encode())


class _Lane:
    """One job on one environment."""

    def __init__(self, job: Job, env: MetaworldEnv) -> None:
        self.job, self.env, self.outcome = job, env, Outcome(job, tape=Tape() if job.record else None)
        self.chunk: Any = None
        self.rng = np.random.default_rng([job.seed, zlib.crc32(job.condition.encode())])

    def finished(self, action_repeat: int) -> bool:
        return self.outcome.success or self.outcome.steps + action_repeat > self.job.max_steps

    def action(self, row: int, execute: int, expert: ScriptedExpert, replay: np.ndarray | None) -> np.ndarray:
        if self.job.controller == "expert":
            action = expert.act(self.env)
        elif self.job.controller == "replay":
            assert replay is not None, "jobs with controller='replay' need a trajectory"
            action = replay[min(row, len(replay) - 1)]
        else:
            action = self.chunk[row % execute]
        if self.job.noise:
            action = action + np.r_[self.rng.normal(0.0, self.job.noise, 3), 0.0]
        return action

    def step(self, action: np.ndarray) -> None:
        if self.outcome.tape is not None:
            self.outcome.tape.add(self.env, action)
        self.outcome.success = self.env.step(action)
        self.outcome.steps = self.env.elapsed
