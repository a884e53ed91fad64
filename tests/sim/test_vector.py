"""The vector API against a plain loop over the same simulator, under every combination of its settings."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError, SimulatorError
from prts_core.policy.observation import STATE
from prts_core.sim.pool import Pool, WorkerLaunch, launch_for
from prts_core.sim.reset_ids import EXHAUSTED, reset_ids
from prts_core.sim.suites import suite, task_of
from prts_core.sim.vector import ChunkStep, VectorEnv, VectorSettings
from tests.fixtures.toy_family.environment import Toy

FAMILY = "tests.fixtures.toy_family"
SPEC = suite(f"{FAMILY}:toy")
STORED = suite(f"{FAMILY}:toy_stored")
SLOTS = 4


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(WorkerLaunch(FAMILY), SLOTS) as made:
        yield made


@given(
    order=st.sampled_from(["training", "evaluation"]),
    groups=st.integers(1, 5),
    world=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_reset_ids_are_dealt_out_once(order: Any, groups: int, world: int, seed: int):
    total = 3 + 2 + 5  # `drawn` has as many as its protocol has episodes
    dealt = []
    for rank in range(world):
        ids = reset_ids(SPEC, groups, order=order, seed=seed, rank=rank, world=world)
        mine = [ids(group, episode) for episode in range(20) for group in range(groups)]
        share = len(range(rank, total, world))
        dealt += mine[:share]
        rest = mine[share : 2 * share]
        assert rest == (mine[:share][: len(rest)] if order == "training" else [EXHAUSTED] * len(rest))
    assert sorted(dealt) == list(range(total))


def test_reset_ids_name_tasks_and_initial_states():
    ids = reset_ids(SPEC, 1, order="evaluation")
    keys = [ids.key(ids(0, n), 9) for n in range(10)]
    assert [(key.task, key.initial_state) for key in keys] == [
        ("push", 0),
        ("shove", 0),
        ("drawn", 0),
        ("push", 1),
        ("shove", 1),
        ("drawn", 1),
        ("push", 2),
        ("drawn", 2),
        ("drawn", 3),
        ("drawn", 4),
    ]
    assert {key.seed for key in keys} == {9} and {key.suite for key in keys} == {"toy"}
    only = reset_ids(SPEC, 1, order="evaluation", tasks=("shove",))
    assert [only.key(only(0, n), 0).initial_state for n in range(2)] == [0, 1] and only(0, 2) == EXHAUSTED


def test_fixed_ids_stay():
    ids = reset_ids(SPEC, 3, fixed=True, seed=1)
    first = [ids(group, 0) for group in range(3)]
    assert len(set(first)) == 3 and [ids(group, 7) for group in range(3)] == first


def test_what_cannot_be_dealt_out_is_said():
    with pytest.raises(ConfigError, match="more processes than initial states"):
        reset_ids(STORED, 1, rank=5, world=6)
    with pytest.raises(ConfigError, match="did you mean 'push'"):
        reset_ids(SPEC, 1, tasks=("pus",))


class PlainLoop:
    """One environment by the rules of the vector API's docstring, one step at a time."""

    def __init__(self, env: int, spec: Any, chosen: VectorSettings) -> None:
        self.group, self.spec, self.chosen, self.begun = env // chosen.group_size, spec, chosen, 0
        self.ids = reset_ids(
            spec, SLOTS // chosen.group_size, order=chosen.order, fixed=chosen.fixed_ids, seed=spec.seed
        )
        self.toy, self.alive = Toy(0.0), False

    def reset(self) -> None:
        reset_id = self.ids(self.group, self.begun)
        self.alive = reset_id != EXHAUSTED
        if not self.alive:
            return
        self.begun += 1
        self.key = self.ids.key(reset_id, self.spec.seed)
        self.task = task_of(self.spec, self.key.task)
        self.toy.reset(self.spec, self.task, self.key.initial_state, self.key.seed)
        self.rewards: list[float] = []
        self.solved: list[bool] = []

    def step(self, action: np.ndarray) -> tuple[float, bool] | None:
        """(reward, solved), or None when the episode's limit was reached before."""
        if len(self.solved) >= (self.chosen.max_steps or self.task.max_steps):
            return None
        _, solved = self.toy.step(action)
        was = self.solved[-1] if self.solved and self.chosen.relative_reward else False
        self.rewards.append(self.chosen.reward_coef * (float(solved) - float(was)))
        self.solved.append(solved)
        return self.rewards[-1], solved


def compare(loop: PlainLoop, env: int, actions: np.ndarray, seen: ChunkStep, chosen: VectorSettings) -> None:
    """Take the chunk in the plain loop and hold the vector's answer against it."""
    if not loop.alive:
        assert not seen.valid[env].any() and not seen.rewards[env].any() and seen.ended[env] is None
        return
    taken = [loop.step(action) for action in actions]
    executed = [one for one in taken if one is not None]
    rest = [False] * (len(actions) - len(executed))
    assert seen.valid[env].tolist() == [True] * len(executed) + rest
    assert seen.successes[env].tolist() == [solved for _, solved in executed] + rest
    assert np.allclose(seen.rewards[env], [reward for reward, _ in executed] + [0.0] * len(rest))
    solved = [not chosen.ignore_terminations and one for one in seen.successes[env].tolist()]
    late = len(loop.solved) >= (chosen.max_steps or loop.task.max_steps)
    assert (seen.terminations[env].any(), seen.truncations[env].any()) == (any(solved), late)
    if chosen.auto_reset or chosen.ignore_terminations:
        assert not seen.terminations[env, :-1].any() and not seen.truncations[env, :-1].any()
    else:
        assert seen.terminations[env].tolist() == solved
    ended, final = seen.ended[env], seen.final_observation[env]
    assert (ended is not None) == (final is not None) == (any(solved) or late)
    if ended is None or final is None:
        return
    first = loop.solved.index(True) + 1 if any(loop.solved) else None
    assert (ended.key, ended.steps) == (loop.key, len(loop.solved))
    assert (ended.success_once, ended.success_at_end) == (any(loop.solved), loop.solved[-1])
    assert ended.length == (first or len(loop.solved)) and np.isclose(ended.returned, sum(loop.rewards[:first]))
    assert np.array_equal(final[STATE], loop.toy.proprioception())
    if chosen.auto_reset:
        loop.reset()
    else:
        loop.alive = False


CHOICES = st.builds(
    VectorSettings,
    group_size=st.sampled_from([1, 2, 4]),
    order=st.sampled_from(["training", "evaluation"]),
    fixed_ids=st.booleans(),
    auto_reset=st.booleans(),
    ignore_terminations=st.booleans(),
    relative_reward=st.booleans(),
    reward_coef=st.sampled_from([1.0, 5.0]),
    max_steps=st.sampled_from([0, 7]),
)


@given(chosen=CHOICES, chunk=st.sampled_from([1, 3, 5]), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_it_does_what_a_plain_loop_does(pool: Pool, chosen: VectorSettings, chunk: int, seed: int):
    rng = np.random.default_rng(seed)
    made = VectorEnv(pool, STORED, chosen)
    loops = [PlainLoop(env, STORED, chosen) for env in range(SLOTS)]
    observation, instructions = made.reset()
    for loop in loops:
        loop.reset()
    for _ in range(8):
        for env, loop in enumerate(loops):
            if loop.alive:
                assert np.array_equal(observation[STATE][env], loop.toy.proprioception())
                assert instructions[env] == loop.task.instruction
        actions = rng.normal(0.3, 0.6, (SLOTS, chunk, 2)).astype(np.float32)
        seen = made.chunk_step(actions)
        for env, loop in enumerate(loops):
            compare(loop, env, actions[env], seen, chosen)
        observation, instructions = seen.observation, seen.instructions
        assert seen.active.tolist() == [loop.alive for loop in loops]
        assert observation["observation.images.eye"].shape == (SLOTS, 8, 8, 3)


def test_a_group_starts_from_one_state_to_the_bit(pool: Pool):
    made = VectorEnv(pool, SPEC, VectorSettings(group_size=2))
    seen = set()
    for _ in range(4):
        state = made.reset()[0][STATE]
        assert state[0].tobytes() == state[1].tobytes() and state[2].tobytes() == state[3].tobytes()
        seen |= {state[0].tobytes(), state[2].tobytes()}
    assert len(seen) == 8, "the two groups walk different initial states"


def test_an_evaluation_counts_every_initial_state_once(pool: Pool):
    made, keys = VectorEnv(pool, SPEC, VectorSettings(order="evaluation")), []
    made.reset()
    active = True
    while active:
        seen = made.chunk_step(np.tile(np.array([0.4, 0.0], np.float32), (SLOTS, 4, 1)))
        keys += [ended.key for ended in seen.ended if ended is not None]
        active = bool(seen.active.any())
    assert len(keys) == 10 and len(set(keys)) == 10


def test_a_perturbation_is_laid_over_every_episode(pool: Pool):
    plain = VectorEnv(pool, SPEC, VectorSettings()).reset()[0][STATE]
    moved = VectorEnv(pool, SPEC, VectorSettings(perturbation={"shift": 0.25}))
    assert np.allclose(moved.reset()[0][STATE], plain + 0.25)
    seen = moved.chunk_step(np.full((SLOTS, 12, 2), 0.1, np.float32))
    assert all(ended is not None for ended in seen.ended) and seen.active.all(), "every next one began as well"


def history(made: VectorEnv, kills: bool) -> list[bytes]:
    """Everything five chunks return; with `kills`, a worker is killed or stopped before each of them."""
    rng = np.random.default_rng(3)
    parts = list(made.reset()[0].values())
    for number in range(5):
        if kills:
            worker = made.pool.workers[number % SLOTS]
            assert worker is not None
            os.kill(worker.process.pid, signal.SIGKILL)
        seen = made.chunk_step(rng.normal(0.2, 0.5, (SLOTS, 4, 2)))
        parts += [*seen.observation.values(), seen.rewards, seen.terminations, seen.truncations, seen.valid]
    return [part.tobytes() for part in parts]


@pytest.mark.parametrize("auto_reset", [True, False])
def test_a_lost_worker_changes_nothing(pool: Pool, auto_reset: bool):
    chosen = VectorSettings(group_size=2, auto_reset=auto_reset, perturbation={"shift": 0.1})
    before = pool.lost
    calm = history(VectorEnv(pool, SPEC, chosen), kills=False)
    assert pool.lost == before
    assert history(VectorEnv(pool, SPEC, chosen), kills=True) == calm and pool.lost > before


def test_actions_may_be_overwritten_once_they_are_given(pool: Pool):
    made = VectorEnv(pool, SPEC, VectorSettings(auto_reset=False, ignore_terminations=True))
    made.reset()
    actions = np.full((SLOTS, 2, 2), 0.1, np.float32)
    before = made.chunk_step(actions).observation[STATE]
    actions[:] = 0.0
    worker = pool.workers[0]
    assert worker is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    after = made.chunk_step(actions).observation[STATE]
    assert np.allclose(after, before, atol=0.05), "the lost one is brought back by what it was given then"


def test_an_episode_that_kills_every_worker_is_told(pool: Pool):
    made = VectorEnv(pool, suite(f"{FAMILY}:toy_deadly"), VectorSettings())
    made.reset()
    with pytest.raises(SimulatorError, match=r"3 lost; the last: .* ended by SIGKILL"):
        made.chunk_step(np.zeros((SLOTS, 2, 2)))
    while any(pool.under_way):  # the other slots' replies
        pool.wait()


def test_what_does_not_fit_is_refused(pool: Pool):
    with pytest.raises(ConfigError, match="a divisor of the 4 slots"):
        VectorEnv(pool, SPEC, VectorSettings(group_size=3))
    made = VectorEnv(pool, SPEC, VectorSettings())
    for shape in ((SLOTS, 2), (SLOTS, 0, 2), (SLOTS + 1, 1, 2), (SLOTS, 1, 3)):
        with pytest.raises(ConfigError, match="Actions do not fit"):
            made.chunk_step(np.zeros(shape))
    made.reset()
    assert made.step(np.zeros((SLOTS, 2))).rewards.shape == (SLOTS, 1)


@pytest.mark.slow
def test_a_real_simulator_is_brought_back_too():
    """Meta-World, pictures included: one of two workers is killed in the middle of an episode."""
    pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")
    spec = suite("metaworld")
    chosen = VectorSettings(group_size=2, max_steps=10, ignore_terminations=True, tasks=("faucet-open",))
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, (3, 2, 4, 4)).astype(np.float32)
    actions[:, 1] = actions[:, 0]
    with Pool(launch_for("metaworld"), 2) as pool:
        made = VectorEnv(pool, spec, chosen)
        made.reset()
        for number, chunk in enumerate(actions):
            if number == 2:
                worker = pool.workers[1]
                assert worker is not None
                os.kill(worker.process.pid, signal.SIGKILL)
            seen = made.chunk_step(chunk)
            for value in seen.observation.values():
                assert np.array_equal(value[0], value[1]), "equal actions from one state, the second after a death"
        assert pool.lost == 1 and [ended.steps for ended in seen.ended if ended is not None] == [10, 10]
        assert seen.valid.sum(axis=1).tolist() == [2, 2] and seen.active.all()
