"""Hold the vector API and its initial states against the public implementation's, on a simulator played from a script.

What the reference decides otherwise on purpose of ours is said where it is compared (shared/golden/rl/README.md).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prts_core.config.rl import RewardConfig
from prts_core.policy.observation import STATE
from prts_core.rl.rewards import earn
from prts_core.sim.reset_ids import EXHAUSTED, ResetIds, reset_ids
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.vector import ChunkStep, VectorEnv, VectorSettings
from tests.fixtures.toy_family.spec import CONTRACT
from tests.rl.golden_rl import Case, load, names

PREFIXES = ("chunk_step", "eval_ids", "evaluate", "libero", "reset_ids")


def cases(*prefixes: str) -> Any:
    found = [name for name in names() if name.startswith(prefixes)]
    absent = pytest.param("", marks=pytest.mark.skip("golden/rl is absent: set PRTS_SHARED to a folder that has it"))
    return pytest.mark.parametrize("name", found or [absent])


def spec_of(case: Case) -> SuiteSpec:
    """A suite with the case's numbers of initial states."""
    limit = case.facts.get("max_episode_steps", 12)
    tasks = tuple(Task(f"task{n}", "do it", int(trials), limit) for n, trials in enumerate(case["trials_per_task"]))
    return SuiteSpec("scripted", "none", tasks, CONTRACT, 0, (0.0, 0.0), 0, 1, 0, "made up")


class Script:
    """Environments whose t-th step, counted on over resets, is solved where the case's table says so."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.slots = table.numpy(), table.shape[1]
        self.taken = [0] * self.slots
        self.begun: list[tuple[int, str, int]] = []
        self.replies: deque[tuple[int, dict[str, Any]]] = deque()

    def send(self, slot: int, message: dict[str, Any]) -> None:
        observation = {STATE: np.zeros(2, np.float32), "observation.images.eye": np.zeros((8, 8, 3), np.uint8)}
        reply: dict[str, Any] = {"observation": observation, "instruction": "do it"}
        if message["kind"] == "reset":
            self.begun.append((slot, message["task"], message["initial_state"]))
        else:
            first, steps = self.taken[slot], len(message["actions"])
            reply["expert"] = None
            reply["successes"] = self.table[first : first + steps, slot]
            self.taken[slot] += steps
        self.replies.append((slot, reply))

    def wait(self, timeout: float | None = None) -> tuple[int, dict[str, Any]]:
        return self.replies.popleft()


def vector(case: Case, script: Script) -> VectorEnv:
    facts = case.facts
    chosen = VectorSettings(
        group_size=facts["group_size"],
        order="evaluation" if facts["is_eval"] else "training",
        auto_reset=facts["auto_reset"],
        ignore_terminations=facts.get("ignore_terminations", False),
        reward_coef=facts.get("reward_coef", 5.0),
        relative_reward=facts.get("use_rel_reward", True),
    )
    return VectorEnv(script, spec_of(case), chosen)  # type: ignore[arg-type]


def play(env: VectorEnv, chunks: int, length: int) -> list[ChunkStep]:
    return [env.chunk_step(np.zeros((env.pool.slots, length, 2), np.float32)) for _ in range(chunks)]


@cases("chunk_step")
def test_golden_chunk_steps(name: str) -> None:
    """Step by step while an environment has an episode. Ours rests after its last one; whose turn the next initial
    state is does not depend on who was quicker, so in an evaluation with ends of unlike length others rest than in
    theirs."""
    case = load(name)
    facts, out = case.facts, case.outputs
    script = Script(case["success_table"])
    env = vector(case, script)
    env.reset()
    live = np.ones(script.slots, bool)
    for at, seen in enumerate(play(env, facts["chunks"], facts["chunk"])):
        last = (at + 1) * facts["chunk"] - 1
        assert seen.valid[live].all() and not seen.valid[~live].any()
        for ours, theirs in ((seen.terminations, "terminations"), (seen.truncations, "truncations")):
            assert np.array_equal(ours[live], out[theirs][at].numpy()[live])
        if not facts["use_step_penalty"]:  # the vector API has no price of steps: see below
            assert np.allclose(seen.rewards[live], out["rewards"][at].numpy()[live])
        ended = np.asarray([one is not None for one in seen.ended])
        if facts["auto_reset"]:
            assert np.array_equal(ended[live], out["counted"][at].numpy()[live])
        for slot in ended.nonzero()[0]:
            episode = seen.ended[slot]
            assert episode is not None
            assert episode.success_once == bool(out["episode.success_once"][last, slot])
            assert episode.steps == int(out["episode.episode_len"][last, slot])  # quirk 20: to the end of the chunk
            if facts["ignore_terminations"]:
                assert episode.success_at_end == bool(out["episode.success_at_end"][last, slot])
            if not facts["use_step_penalty"]:
                assert episode.returned == pytest.approx(float(out["episode.return"][last, slot]))
                mean = episode.returned / episode.length
                assert mean == pytest.approx(float(out["episode.reward"][last, slot]), abs=1e-6)
        live = seen.active


@cases("chunk_step")
def test_golden_rewards_of_solved_steps(name: str) -> None:
    """Where one episode takes the whole table. A relative reward with a price of steps: theirs is the change of both,
    of which only the first step costs anything; in ours every step does."""
    case = load(name)
    facts = case.facts
    if facts["auto_reset"]:
        pytest.skip("several episodes in a column: their rewards are those of the vector API's test")
    shape = (facts["chunks"], facts["chunk"], facts["num_envs"])
    successes = case["success_table"].reshape(shape).transpose(1, 2)
    price = float(facts["use_step_penalty"])
    config = RewardConfig(facts["reward_coef"], relative=facts["use_rel_reward"], step_penalty=price)
    got = earn(successes, torch.ones_like(successes), config)
    wanted = case.outputs["rewards"].clone()
    if price and facts["use_rel_reward"]:
        wanted -= price
        wanted[0, :, 0] += price
    torch.testing.assert_close(got, wanted)


def walk(ids: ResetIds, groups: int, episodes: int) -> list[list[int]]:
    return [[ids(group, n) for group in range(groups)] for n in range(episodes)]


@cases("reset_ids")
def test_golden_reset_ids(name: str) -> None:
    """An id means the same task and initial state. Ours are drawn once and walked: the same walk as theirs in one
    process until they draw anew; and no process misses a state for being one of many."""
    case = load(name)
    facts, out = case.facts, case.outputs
    chosen, spec = facts.get("task_id_filter"), spec_of(case)
    ids = reset_ids(spec, 1)
    for reset_id, task, trial in zip(
        *(out[k].flatten().tolist() for k in ("reset_state_ids", "task_id", "trial_id")), strict=True
    ):
        key = ids.key(reset_id, 0)
        assert (key.task, key.initial_state) == (f"task{task}", trial)
    size, world = facts["group_size"], facts["world"]
    groups = facts["num_envs_per_worker"] // size
    states = out["reset_state_ids"].reshape(world, -1, groups, size)
    assert (states == states[..., :1]).all()  # a group starts from one state, as in `VectorEnv`
    if "specific_reset_id" in facts:
        return
    tasks = tuple(f"task{n}" for n in chosen or ())
    total = len(reset_ids(spec, 1, tasks=tasks).ids)
    if world <= total:
        dealt = [
            reset_ids(spec, groups, tasks=tasks, seed=facts["seed"], rank=rank, world=world) for rank in range(world)
        ]
        once = Counter(int(one) for shard in dealt for one in shard.ids)
        assert set(once.values()) == {1} and len(once) == total
    theirs = {(int(a), int(b)) for a, b in zip(out["task_id"].flatten(), out["trial_id"].flatten(), strict=True)}
    if chosen:
        assert {task for task, _ in theirs} <= set(chosen)
    if facts.get("use_ordered_reset_state_ids", True) and world == 1 and not chosen:
        before = total // groups  # their order holds as long as it suffices for all groups
        ours = walk(reset_ids(spec, groups, seed=0), groups, before)
        assert ours == states[0, :before, :, 0].tolist()


@cases("eval_ids")
def test_golden_evaluation_ids(name: str) -> None:
    case = load(name)
    spec, world = spec_of(case), case.facts["world"]
    assert reset_ids(spec, 1, order="evaluation").ids.tolist() == case.outputs["interleaved"].tolist()
    for rank, pool in enumerate(case.outputs["pool"].tolist()):
        ids = reset_ids(spec, 1, order="evaluation", rank=rank, world=world)
        assert [ids(0, n) for n in range(len(pool))] == pool and EXHAUSTED == -1


@cases("evaluate")
def test_golden_evaluation(name: str) -> None:
    """Every (task, initial state) once. Defect 11: without resets of its own their second pass counts the first trials
    again; ours goes on with the next."""
    case = load(name)
    facts, out = case.facts, case.outputs
    script = Script(case["success_table"])
    env = vector(case, script)
    env.reset()
    episodes = []
    for epoch in range(facts["rollout_epoch"]):
        if epoch and not facts["auto_reset"]:
            env.reset()
        for seen in play(env, facts["chunk_steps"], facts["chunk"]):
            episodes += [one for one in seen.ended if one is not None]
    assert len(episodes) == int(out["metric.num_trajectories"])
    numbers = {
        "return": [one.returned for one in episodes],
        "reward": [one.returned / one.length for one in episodes],
        "episode_len": [one.steps for one in episodes],
        "success_once": [one.success_once for one in episodes],
        "success_at_end": [one.success_at_end for one in episodes],
    }
    for key, values in numbers.items():
        if facts.get("ignore_terminations") and f"per_trajectory.{key}" in out:  # all episodes are of one length
            assert sorted(values) == pytest.approx(sorted(out[f"per_trajectory.{key}"].tolist()))
            assert float(np.mean(values)) == pytest.approx(float(out[f"metric.{key}"]))
    begun = [(int(task.removeprefix("task")), state) for _, task, state in script.begun]
    theirs = [(task, state) for reset in facts["started_task_trial"] for task, state in reset]
    assert len(set(begun)) == len(begun)
    if facts["auto_reset"]:
        assert set(begun) == set(theirs) and begun[: script.slots] == theirs[: script.slots]
        assert {(int(one.key.task.removeprefix("task")), one.key.initial_state) for one in episodes} == set(begun)
    else:
        first = len(theirs) // facts["rollout_epoch"]
        assert begun[:first] == theirs[:first] == theirs[first:] and not set(begun[first:]) & set(theirs)


@cases("libero_observation")
def test_golden_observation(name: str) -> None:
    from prts_core.sim.suites.libero.environment import axis_angle

    case = load(name)
    xyzw = case["quaternion_xyzw"].numpy()
    got = np.stack([axis_angle(one[[3, 0, 1, 2]]) for one in xyzw])
    np.testing.assert_allclose(got, case.outputs["axis_angle"].numpy(), atol=1e-9)
    turned = case["image"].numpy()[::-1, ::-1]  # as the environment turns its pictures
    assert np.array_equal(turned, case.outputs["rotated"].numpy())


@cases("libero_gripper")
def test_golden_gripper(name: str) -> None:
    pytest.skip("other policies' grippers: a suite takes the number that its contract says, -1 opens, +1 closes")
