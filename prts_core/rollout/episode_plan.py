"""Which episodes a benchmark consists of, in which order, and under which protocol: plain values, digests, seeds.

It knows suites as data, no simulator and no policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.io.files import canonical_json, digest_value
from prts_core.sim.suite import EpisodeKey, SuiteSpec, Task
from prts_core.sim.suites import task_of

EXECUTE = 10  # actions of a chunk executed before the policy looks again, where it gives as many


@dataclass(frozen=True)
class SuiteSettings:
    """What, besides suite and policy, decides a benchmark's rows.

    episodes: in all, spread over the tasks; none: as many as the suite's protocol says. tasks: some of the suite's, or
    none for all. seed: none for the suite's. execute: actions before the next look. perturbation: laid over every
    task's own. skip_states: of each task, from the first on: initial states that are left out. image_size: pixels of
    the pictures that the simulator renders, none for the suite's; for a policy
    trained on smaller ones, which a picture made smaller afterwards does not equal.
    """

    episodes: int | None = None
    tasks: tuple[str, ...] = ()
    seed: int | None = None
    execute: int | None = None
    perturbation: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    skip_states: int = 0


@dataclass(frozen=True)
class EpisodePlan:
    """keys: the episodes, tasks in turn. order: their indices as a test that may stop early reads them, the tasks of
    each round shuffled by the seed: a beginning of the suite's own order may hold the easy ones.

    suite: with the cameras' size as asked for; worker_settings: what its workers are made with to that end.
    """

    suite: SuiteSpec
    tasks: tuple[Task, ...]
    keys: tuple[EpisodeKey, ...]
    execute: int
    perturbation: Mapping[str, Any]
    seed: int
    worker_settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def order(self) -> tuple[int, ...]:
        rounds = range(0, len(self.keys), len(self.tasks))
        rng = np.random.default_rng([self.seed, len(self.tasks)])
        found = [start + place for start in rounds for place in rng.permutation(len(self.tasks)).tolist()]
        return tuple(index for index in found if index < len(self.keys))

    def task(self, key: EpisodeKey) -> Task:
        return next(task for task in self.tasks if task.name == key.task)

    @property
    def protocol(self) -> dict[str, Any]:
        """What makes two results comparable; the number of episodes is not in it, and may grow."""
        suite = self.suite
        return {
            "suite": suite.name,
            "source": suite.source,
            "tasks": [asdict(task) | {"perturbation": dict(task.perturbation)} for task in self.tasks],
            "contract": suite.contract.fingerprint,
            "settle_steps": suite.settle_steps,
            "settle_action": list(suite.settle_action),
            "image_rotation": suite.image_rotation,
            "seed": self.seed,
            "execute": self.execute,
            "perturbation": dict(self.perturbation),
            "standins": suite.standins,
        }

    @property
    def protocol_digest(self) -> str:
        return digest_value(self.protocol)


def make_plan(suite: SuiteSpec, chunk_length: int, settings: SuiteSettings) -> EpisodePlan:
    """The episodes of `settings`. ConfigError for an unknown task, or numbers that make no benchmark."""
    tasks = tuple(task_of(suite, name) for name in dict.fromkeys(settings.tasks)) or suite.tasks
    episodes = len(tasks) * suite.episodes_per_task if settings.episodes is None else settings.episodes
    execute = min(EXECUTE, chunk_length) if settings.execute is None else settings.execute
    if episodes < 1:
        raise ConfigError("A benchmark needs episodes", field="--episodes", found=episodes, expected="1 or more")
    if not 1 <= execute <= chunk_length:
        raise ConfigError(
            "The policy cannot execute that many actions of a chunk",
            field="--execute",
            found=execute,
            expected=f"1 to {chunk_length}",
        )
    seed = suite.seed if settings.seed is None else settings.seed
    if seed < 0:
        raise ConfigError("A seed is not negative", field="--seed", found=seed, expected="0 or more")
    keys = []
    for index in range(episodes):
        task, turn = tasks[index % len(tasks)], index // len(tasks)
        # Beyond the initial states a task ships, the next seed begins with the first of them again.
        left = task.initial_states - settings.skip_states
        if task.initial_states and left < 1:
            raise ConfigError(
                f"No initial state of {task.name!r} is left",
                field="benchmark.skip_states",
                found=settings.skip_states,
                expected=f"less than the {task.initial_states} that it ships",
            )
        again, state = divmod(turn, left) if task.initial_states else (0, turn)
        keys.append(EpisodeKey(suite.name, task.name, settings.skip_states + state, seed + again))
    sized, make = rendered_at(suite, settings.image_size)
    return EpisodePlan(sized, tasks, tuple(keys), execute, dict(settings.perturbation), seed, make)


def rendered_at(suite: SuiteSpec, image_size: int | None) -> tuple[SuiteSpec, dict[str, Any]]:
    """The suite with square cameras of that many pixels, and the settings its workers render so with; none: as it
    is."""
    cameras = suite.contract.cameras
    if image_size is None or all((c.height, c.width) == (image_size, image_size) for c in cameras):
        return suite, {}
    resized = tuple(replace(camera, height=image_size, width=image_size) for camera in cameras)
    return replace(suite, contract=replace(suite.contract, cameras=resized)), {"image_size": image_size}


def noise_seed(key: EpisodeKey, step: int) -> int:
    """(63 bits) of the policy's noise at `step` of an episode: the same in every run, whatever runs beside it."""
    text = canonical_json([key.seed, key.task, key.initial_state, step])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Queue:
    """What is still to do, given out so that a slot keeps its task: changing it costs a simulator seconds.

    window: how far ahead of the first open episode, in the plan's `order`, one may be given out; none: as far as may
    be, in the order of `keys`.
    """

    def __init__(self, plan: EpisodePlan, todo: Sequence[int], window: int | None = None) -> None:
        self.plan, self.window = plan, window
        places = range(len(plan.keys)) if window is None else plan.order
        self.place = {index: place for place, index in enumerate(places)}
        self.todo = sorted(todo, key=self.place.__getitem__)
        self.held: dict[int, str] = {}  # slot -> its task

    def __bool__(self) -> bool:
        return bool(self.todo)

    def take(self, slot: int) -> int | None:
        """The index of the slot's next episode: of its own task, else of the task that has most left and no slot."""
        if not self.todo:
            return None
        last = self.place[self.todo[0]] + (len(self.place) if self.window is None else self.window)
        near = [index for index in self.todo if self.place[index] < last]
        by_task: dict[str, list[int]] = {}
        for index in near:
            by_task.setdefault(self.plan.keys[index].task, []).append(index)
        others = {task for other, task in self.held.items() if other != slot}
        own = self.held.get(slot)
        task = own if own in by_task else max(by_task, key=lambda name: (name not in others, len(by_task[name])))
        self.held[slot] = task
        index = by_task[task][0]
        self.todo.remove(index)
        return index

    def put_back(self, index: int) -> None:
        self.todo = sorted([*self.todo, index], key=self.place.__getitem__)
