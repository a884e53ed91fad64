"""Say which episodes an iteration runs: tasks, initial states, groups and the seeds of their noise.

All of it is a function of the run's configuration and the iteration, so that a resumed run walks the same way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from prts_core.config.rl import RlConfig
from prts_core.io.errors import ConfigError
from prts_core.io.files import canonical_json
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.sim.suite import EpisodeKey, SuiteSpec, Task


@dataclass(frozen=True)
class EpisodeOrder:
    """One episode to be run. index: its place in the iteration; group: episodes of one group share their key. seed: of
    the policy's noise. expert: whether the suite's scripted expert says what it would do, or acts (sim/protocol.py)."""

    index: int
    group: int
    key: EpisodeKey
    max_steps: int
    seed: int
    expert: str = ""

    def noise_seed(self, step: int) -> int:
        """(63 bits) of the noise of the decision at `step`."""
        text = canonical_json([self.seed, self.key.task, self.key.initial_state, self.key.seed, self.index, step])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def training_plan(config: RlConfig, suite: SuiteSpec, chunk_length: int) -> EpisodePlan:
    """The suite's tasks and protocol as the run has them; its keys are those of evaluation."""
    settings = SuiteSettings(
        tasks=config.tasks,
        episodes=None,
        execute=config.execute_steps or chunk_length,
        perturbation=config.perturbation,
        image_size=config.image_size,
    )
    return make_plan(suite, chunk_length, settings)


def orders(config: RlConfig, plan: EpisodePlan, seed: int, iteration: int, experts: bool = False) -> list[EpisodeOrder]:
    """The iteration's episodes, tasks in turn: every group meets an initial state of its own, and all are met before
    one comes again. experts: the scripted expert is asked in all of them, and acts in a share that falls with time."""
    groups = config.episodes // config.algorithm.group_size
    size, tasks = config.algorithm.group_size, plan.tasks
    draws = np.random.default_rng([seed, iteration]).random(config.episodes)
    made = []
    for n in range(groups):
        at = iteration * groups + n
        task, turn = tasks[at % len(tasks)], at // len(tasks)
        key = _training_key(config, plan.suite, task, turn, seed)
        own = seed * 1_000_003 + iteration
        for index in range(n * size, (n + 1) * size):
            acts = experts and draws[index] < config.algorithm.expert_share * config.algorithm.expert_decay**iteration
            expert = ("act" if acts else "label") if experts else ""
            made.append(EpisodeOrder(index, n, key, task.max_steps, own, expert))
    return made


def _training_key(config: RlConfig, suite: SuiteSpec, task: Task, turn: int, seed: int) -> EpisodeKey:
    if not task.initial_states:
        return EpisodeKey(suite.name, task.name, turn, config.train_seed)
    states = training_states(config, task)
    again, place = divmod(turn, len(states))
    order = np.random.default_rng([seed, again]).permutation(len(states))
    return EpisodeKey(suite.name, task.name, states[int(order[place])], suite.seed)


def training_states(config: RlConfig, task: Task) -> list[int]:
    """Of a task that ships its initial states: those that are trained on. ConfigError where that is not said."""
    if config.train_states is None and not config.shared_states:
        raise ConfigError(
            f"Nothing says which initial states of {task.name!r} are trained on",
            field="rl.train_states",
            found=None,
            expected=f"[first, one past the last] of its {task.initial_states}; the others are evaluated on",
            cure=f"rl.train_states: [0, {task.initial_states // 2}], or rl.shared_states: true to evaluate on all",
        )
    first, end = config.train_states or (0, task.initial_states)
    if not 0 <= first < end <= task.initial_states:
        raise ConfigError(
            f"There are no such initial states of {task.name!r}",
            field="rl.train_states",
            found=[first, end],
            expected=f"0 <= first < end <= {task.initial_states}",
        )
    return list(range(first, end))


def evaluation_plan(config: RlConfig, plan: EpisodePlan) -> EpisodePlan:
    """The held-out episodes: each (task, initial state) once, tasks in turn. ConfigError, by name, for a state that is
    trained on too, unless `shared_states` asks for it, and where there are too few."""
    from dataclasses import replace

    each: dict[str, list[EpisodeKey]] = {}
    for task in plan.tasks:
        if not task.initial_states:
            each[task.name] = [
                EpisodeKey(plan.suite.name, task.name, n, plan.suite.seed) for n in range(config.eval_episodes)
            ]
            continue
        trained = set() if config.shared_states else set(training_states(config, task))
        left = [state for state in range(task.initial_states) if state not in trained]
        if len(left) < config.eval_episodes:
            raise ConfigError(
                f"Too few initial states of {task.name!r} are left to evaluate on",
                field="rl.eval_episodes",
                found=config.eval_episodes,
                expected=f"at most {len(left)}: it ships {task.initial_states}, and {len(trained)} are trained on",
            )
        each[task.name] = [
            EpisodeKey(plan.suite.name, task.name, state, plan.suite.seed) for state in left[: config.eval_episodes]
        ]
    keys = tuple(each[task.name][n] for n in range(config.eval_episodes) for task in plan.tasks)
    refuse_leak(config, plan, keys)
    return replace(plan, keys=keys)


def refuse_leak(config: RlConfig, plan: EpisodePlan, keys: tuple[EpisodeKey, ...]) -> None:
    """ConfigError that names the first evaluated state which training meets."""
    if config.shared_states:
        return
    groups = config.episodes // config.algorithm.group_size
    turns = -(-config.iterations * groups // len(plan.tasks))
    for key in keys:
        task = plan.task(key)
        if task.initial_states:
            leaked = key.initial_state in training_states(config, task)
        else:  # the simulator draws from seed + initial_state
            leaked = config.train_seed <= key.seed + key.initial_state < config.train_seed + turns
        if leaked:
            raise ConfigError(
                "An initial state would be trained on and evaluated on",
                field="rl.train_states" if task.initial_states else "rl.train_seed",
                found=f"{key.task}, initial state {key.initial_state}, seed {key.seed}",
                expected="disjoint states",
                cure="choose others, or ask for it by rl.shared_states: true",
            )
