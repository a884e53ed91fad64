"""Stages that take turns do what each does alone, and while the policy answers for one the others execute."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np
import pytest

from prts_core.io.errors import SimulatorError
from prts_core.policy.observation import STATE
from prts_core.sim.pipeline import Pipeline
from prts_core.sim.pool import Pool, WorkerLaunch
from prts_core.sim.suites import suite
from prts_core.sim.vector import ChunkStep, Observation, VectorEnv, VectorSettings

FAMILY = "tests.fixtures.toy_family"
SPEC = suite(f"{FAMILY}:toy")
CHUNKS = 6


@pytest.fixture(scope="module")
def pools() -> Iterator[list[Pool]]:
    with Pool(WorkerLaunch(FAMILY), 2) as one, Pool(WorkerLaunch(FAMILY), 2) as other:
        yield [one, other]


def policy(stage: int, observation: Observation, instructions: list[str]) -> np.ndarray:
    """A push that depends on what is seen, so that an observation of another turn or stage would show."""
    state = observation[STATE]
    return np.stack([0.3 + 0.1 * np.cos(state * (k + 1)) for k in range(4)], axis=1)


def parts(seen: ChunkStep) -> list[bytes]:
    arrays = [*seen.observation.values(), seen.rewards, seen.terminations, seen.truncations, seen.valid]
    return [array.tobytes() for array in arrays] + [repr((seen.ended, seen.instructions)).encode()]


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("order", ["training", "evaluation"])
def test_each_stage_does_what_it_would_do_alone(pools: list[Pool], order, killed: bool):
    chosen = VectorSettings(order=order, group_size=2, rank=1, world=2)
    made, turns = Pipeline(pools, SPEC, chosen), []
    for at, seen in made.run(policy, CHUNKS):
        turns.append((at, parts(seen)))
        worker = pools[at].workers[0]
        if killed and len(turns) == 5 and worker is not None:
            os.kill(worker.process.pid, signal.SIGKILL)
    assert [at for at, _ in turns] == [0, 1] * CHUNKS
    for at, pool in enumerate(pools):
        alone = VectorEnv(pool, SPEC, replace(chosen, rank=2 + at, world=4))
        observation, instructions = alone.reset()
        for mine in [part for stage, part in turns if stage == at]:
            seen = alone.chunk_step(policy(at, observation, instructions))
            assert parts(seen) == mine
            observation, instructions = seen.observation, seen.instructions


def test_the_other_stage_executes_while_the_policy_is_asked(pools: list[Pool]):
    met = 0

    def slow(stage: int, observation: Observation, instructions: list[str]) -> np.ndarray:
        nonlocal met
        other = pools[1 - stage]
        if any(other.under_way):  # not before the very first chunk
            assert other.selector.select(20.0), "its simulator works on while nobody waits for it"
            met += 1
        return policy(stage, observation, instructions)

    assert len(list(Pipeline(pools, SPEC, VectorSettings()).run(slow, CHUNKS))) == 2 * CHUNKS
    assert met == 2 * CHUNKS - 1


def test_an_evaluation_is_dealt_out_to_the_stages(pools: list[Pool]):
    made = Pipeline(pools, SPEC, VectorSettings(order="evaluation"))
    keys = [ended.key for _, seen in made.run(policy, 20) for ended in seen.ended if ended is not None]
    assert len(keys) == len(set(keys)) == 10


def test_a_loop_left_early_goes_on_later(pools: list[Pool]):
    made = Pipeline(pools, SPEC, VectorSettings())
    with closing(made.run(policy, CHUNKS)) as running:
        assert next(running)[0] == 0
    assert not any(stage.under_way for stage in made.stages)
    assert len(list(made.run(policy, 2))) == 4


def test_a_policy_that_fails_leaves_no_stage_hanging(pools: list[Pool]):
    made, calls = Pipeline(pools, SPEC, VectorSettings()), 0

    def fails(stage: int, observation: Observation, instructions: list[str]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise SimulatorError("no answer")
        return policy(stage, observation, instructions)

    with suppress(SimulatorError):
        list(made.run(fails, CHUNKS))
    assert calls == 4 and not any(any(pool.under_way) for pool in pools)
