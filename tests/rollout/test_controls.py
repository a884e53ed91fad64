"""Controls of a benchmark: each changes what it says and nothing else, the same whatever runs beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.contract import Dimension
from prts_core.policy.observation import STATE
from prts_core.rollout.controls import (
    PLAIN,
    ActionNoise,
    ActsLike,
    BlackImages,
    NoOpPolicy,
    OpenLoopReplay,
    SwappedInstruction,
    mean_trajectory,
)
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.rollout.local_policy import LocalPolicy
from prts_core.rollout.runner import ExpertRunner, Runner, finished, missing, open_journal, without_expert
from prts_core.sim.suite import EpisodeKey
from tests.rollout.toy_slots import CAMERA, CHUNK, CONTRACT, SAME, SUITE, DotPolicy, ToySlots

KEY = EpisodeKey("dots", "left", 0, 7)


def plan_of(execute: int = 4, length: int = CHUNK, **more) -> EpisodePlan:
    return make_plan(SUITE, length, SuiteSettings(episodes=12, execute=execute, **more))


def run(
    folder: Path, plan: EpisodePlan, slots: ToySlots, policy=None, how=Runner, control=PLAIN, **options
) -> list[dict]:
    policy = LocalPolicy(policy or DotPolicy(noise=0.0), {"policy_digest": "sha256:toy"}, **options)
    with open_journal(folder / "journal.jsonl", plan, policy) as journal:
        how(plan, policy, slots, journal, adapter=SAME, actions=folder / "actions", control=control).run()
        assert missing(plan, journal) == []
        return [{k: v for k, v in row.items() if k != "latency_ms"} for row in finished(plan, journal)]


def test_another_sentence_is_what_the_policy_hears_and_what_the_row_says(tmp_path):
    other = SwappedInstruction({"left": "go right", "right": "go left"})
    rows = run(tmp_path, plan_of(), ToySlots(2), control=other)
    assert {(row["task"], row["instruction"], row["success"]) for row in rows} == {
        ("left", "go right", False),
        ("right", "go left", False),
        ("up", "go up", True),
    }


def test_black_pictures_leave_the_state():
    seen = {STATE: np.ones(2, np.float32), CAMERA: np.full((8, 8, 3), 9, np.uint8)}
    shown = BlackImages().observation(seen)
    assert shown[STATE] is seen[STATE] and not shown[CAMERA].any() and shown[CAMERA].dtype == np.uint8
    assert seen[CAMERA].any()


@pytest.mark.parametrize("slots", [1, 3])
def test_shaking_is_the_episodes_own(tmp_path, slots):
    rows = run(tmp_path / "a", plan_of(), ToySlots(slots, order=slots), control=ActionNoise(0.3, CONTRACT), batch=slots)
    calm = run(tmp_path / "b", plan_of(), ToySlots(1))
    assert rows == run(tmp_path / "c", plan_of(), ToySlots(2), control=ActionNoise(0.3, CONTRACT), batch=slots) != calm


def test_shaking_goes_by_the_step_not_by_the_chunk_and_spares_the_gripper():
    width = replace(CONTRACT, action=(*CONTRACT.action, Dimension("gripper_effort", "1")))
    whole = ActionNoise(0.3, width).actions(KEY, 0, np.zeros((6, 3), np.float32))
    parts = [ActionNoise(0.3, width).actions(KEY, step, np.zeros((2, 3), np.float32)) for step in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert not whole[:, 2].any() and 0.1 < whole[:, :2].std() < 0.6 and whole.dtype == np.float32
    assert np.abs(ActionNoise(5.0, width).actions(KEY, 0, whole)).max() == 1.0


def test_a_replay_looks_at_nothing_and_holds_its_last_row(tmp_path):
    played = {name: np.array([[0.1, 0.0], [0.2, 0.0]]) for name in ("left", "right", "up")}
    pool, still = ToySlots(2), NoOpPolicy(DotPolicy().contract, 24)
    rows = run(tmp_path, plan_of(24, 24), pool, still, control=OpenLoopReplay(played), values=False)
    assert pool.looks == len(rows) == 12 and {row["success"] for row in rows if row["task"] != "right"} == {False}
    actions = np.load(tmp_path / "actions" / "00000.npy", allow_pickle=False)
    np.testing.assert_allclose(actions, [[0.1, 0.0], *[[0.2, 0.0]] * 23], rtol=1e-6)
    assert all(row["values"] == [] for row in rows)


def test_values_may_be_anothers():
    class Judge(DotPolicy):
        def value(self, observation, actions, instruction):
            return np.full(len(instruction), 5.0)

    policy = LocalPolicy(ActsLike(DotPolicy(), Judge(), DotPolicy().contract), {})
    seen = {STATE: np.zeros((1, 2), np.float32), CAMERA: np.zeros((1, 8, 8, 3), np.uint8)}
    answer = policy.ask(seen, ["go left"], [0])
    assert answer.values is not None and answer.values[0] == 5.0
    np.testing.assert_array_equal(answer.chunks, DotPolicy().act(seen, ["go left"], [0]))


@pytest.mark.parametrize("slots", [1, 4])
def test_the_expert_is_one_message_an_episode(tmp_path, slots):
    lost = {plan_of().keys[5]}
    pool = ToySlots(slots, dies=lambda key, n: key in lost and not lost.remove(key))
    rows = run(tmp_path, plan_of(), pool, how=ExpertRunner)
    assert len(rows) == 12 and all(row["success"] and row["looks"] == 0 for row in rows) and pool.looks == 0
    assert len(pool.resets) == 13
    assert np.load(tmp_path / "actions" / "00003.npy", allow_pickle=False).shape == (rows[3]["steps"], 2)
    assert run(tmp_path, plan_of(), ToySlots(1), how=ExpertRunner) == rows


def test_a_task_without_an_expert_is_left_out_and_told(tmp_path):
    pool = ToySlots(3, skills=("left", "up"))
    rows = run(tmp_path, plan_of(), pool, how=ExpertRunner)
    assert {row["task"] for row in rows} == {"left", "up"} and len(rows) == 8
    plan, policy = plan_of(), LocalPolicy(DotPolicy(noise=0.0), {"policy_digest": "sha256:toy"})
    with open_journal(tmp_path / "journal.jsonl", plan, policy) as journal:
        assert without_expert(journal) == {"right": "nobody can go right"} and missing(plan, journal) == []


def test_a_batch_that_costs_by_the_sample_waits_until_it_is_full(tmp_path):
    class Counting(DotPolicy):
        def act(self, observation, instruction, seeds):
            self.asked.append(len(set(seeds)))  # a batch that is filled up holds its first sample twice
            return super().act(observation, instruction, seeds)

    eager, patient = Counting(), Counting()
    rows = run(tmp_path / "a", plan_of(), ToySlots(4), eager, batch=4)
    assert run(tmp_path / "b", plan_of(), ToySlots(4), patient, batch=4, fill=True) == rows
    assert len(patient.asked) < len(eager.asked)


def test_the_mean_is_over_those_still_running():
    class Recorded:
        def episodes(self, split):
            assert split == "train"
            return [0, 1, 2]

        def instruction(self, episode):
            return "go up" if episode == 2 else "go left"

        def actions(self, episode):
            return np.full((2 + episode, 2), float(episode))

    made = mean_trajectory(Recorded(), "go left")  # type: ignore[arg-type]
    assert made is not None
    np.testing.assert_array_equal(made[:, 0], [0.5, 0.5, 1.0])
    assert mean_trajectory(Recorded(), "go right") is None  # type: ignore[arg-type]
