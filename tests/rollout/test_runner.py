"""Episodes come out the same whatever runs beside them, whatever dies on the way, and are each counted once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError, DataError, SimulatorError, StageError
from prts_core.policy.observation import STATE
from prts_core.rollout.episode_plan import EpisodePlan, Queue, SuiteSettings, make_plan, noise_seed
from prts_core.rollout.local_policy import LocalPolicy, ask_filled, neighbours_matter
from prts_core.rollout.runner import Runner, finished, missing, open_journal, outcomes
from prts_core.statistics.sprt import RateTest, Stop
from tests.rollout.toy_slots import CAMERA, CHUNK, SAME, SUITE, TASKS, DotPolicy, ToySlots

INSTRUCTIONS = [task.instruction for task in TASKS]


def plan_of(episodes: int = 12, **more) -> EpisodePlan:
    return make_plan(SUITE, CHUNK, SuiteSettings(episodes=episodes, execute=4, **more))


def policy_of(batch: int = 3, policy: DotPolicy | None = None) -> LocalPolicy:
    return LocalPolicy(policy or DotPolicy(), {"policy_digest": "sha256:toy"}, batch=batch)


def run(folder: Path, plan: EpisodePlan, slots: ToySlots, policy: LocalPolicy | None = None, stop=None) -> list[dict]:
    policy = policy or policy_of()
    with open_journal(folder / "journal.jsonl", plan, policy) as journal:
        Runner(plan, policy, slots, journal, adapter=SAME, actions=folder / "actions", stop=stop).run()
        return [{k: v for k, v in row.items() if k != "latency_ms"} for row in finished(plan, journal)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    rows = run(tmp_path_factory.mktemp("one"), plan_of(), ToySlots(1))
    assert len(rows) == 12 and 0 < sum(row["success"] for row in rows) < 12  # a test that could not fail otherwise
    return rows


@given(st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 0.5))
@settings(max_examples=6)
def test_rows_depend_on_neither_workers_nor_order_nor_losses(tmp_path_factory, expected, slots, order, share):
    rng, used = np.random.default_rng(order), Counter()

    def dies(key, message):
        used[key] += 1
        lost = used[key] < 4 and rng.random() < share
        used[key] += lost
        return lost

    pool = ToySlots(slots, order, dies)
    assert run(tmp_path_factory.mktemp("many"), plan_of(), pool) == expected


def test_a_lost_worker_costs_its_episode_only_and_counts_once(tmp_path, expected):
    fatal = {(plan_of().keys[4], 2)}

    def dies(key, message):
        return (key, message) in fatal and not fatal.remove((key, message))

    pool = ToySlots(3, dies=dies)
    assert run(tmp_path, plan_of(), pool) == expected
    assert Counter(pool.resets) == Counter(plan_of().keys) + Counter([plan_of().keys[4]])


def test_an_episode_that_ends_every_worker_is_told(tmp_path):
    bad = plan_of().keys[3]
    with pytest.raises(SimulatorError, match=f"ends every worker.*{bad.task}, {bad.initial_state}"):
        run(tmp_path, plan_of(), ToySlots(2, dies=lambda key, message: key == bad and message == 2))
    rows = run(tmp_path, plan_of(3), ToySlots(2))  # what was finished stays
    assert len(rows) == 3


@pytest.mark.parametrize("after", [0, 1, 5, 11, 12])
def test_a_run_goes_on_where_it_was_cut(tmp_path, expected, after):
    class Cut(Exception):
        pass

    def progress(rows):
        if len(rows) == after:
            raise Cut

    plan, policy = plan_of(), policy_of()
    with open_journal(tmp_path / "journal.jsonl", plan, policy) as journal:
        runner = Runner(
            plan, policy, ToySlots(2), journal, adapter=SAME, actions=tmp_path / "actions", progress=progress
        )
        if after:
            with pytest.raises(Cut):
                runner.run()
    pool = ToySlots(3, order=9)
    assert run(tmp_path, plan, pool) == expected
    assert len(pool.resets) == 12 - after
    assert run(tmp_path, plan, pool) == expected and len(pool.resets) == 12 - after  # a second run does nothing


def test_more_episodes_go_on_from_fewer_and_other_settings_are_refused(tmp_path, expected):
    assert run(tmp_path, plan_of(5), ToySlots(2)) == expected[:5]
    pool = ToySlots(2)
    assert run(tmp_path, plan_of(12), pool) == expected and len(pool.resets) == 7
    for plan, policy, told in (
        (plan_of(seed=8), policy_of(), "protocol.seed is 7, now 8"),
        (replace(plan_of(), execute=2), policy_of(), "protocol.execute is 4, now 2"),
        (plan_of(), policy_of(batch=1), "settings.batch is 3, now 1"),
        (plan_of(perturbation={"light": 1}), policy_of(), "protocol.perturbation.light is None, now 1"),
    ):
        with pytest.raises(StageError, match="another benchmark") as error:
            run(tmp_path, plan, ToySlots(1), policy)
        assert told in str(error.value)


def test_pictures_are_taken_only_when_the_policy_looks_and_batches_are_full(tmp_path):
    policy, pool = DotPolicy(), ToySlots(3)
    rows = run(tmp_path, plan_of(), pool, policy_of(batch=3, policy=policy))
    assert set(policy.asked) == {3}
    looks = sum(row["looks"] for row in rows)
    failures = sum(not row["success"] for row in rows)
    assert looks <= pool.looks <= looks + 12 - failures  # the look of the chunk in which an episode succeeds is unused
    for row in rows:
        assert row["looks"] == -(-row["steps"] // 4) == len(row["values"])
        assert row["value_rows"] == list(range(0, row["steps"], 4))
        assert row["steps"] == 24 or row["success"]


def test_recorded_actions_are_those_executed(tmp_path, expected):
    run(tmp_path, plan_of(), ToySlots(2))
    for index, row in enumerate(expected):
        actions = np.load(tmp_path / "actions" / f"{index:05d}.npy", allow_pickle=False)
        assert actions.shape == (row["steps"], 2) and actions.dtype == np.float32


@given(st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=5)
def test_early_stopping_reads_the_plan_in_order_whoever_finishes_first(tmp_path_factory, slots, order):
    plan, test = plan_of(60), RateTest(0.3, 0.6, 60)
    folder, policy = tmp_path_factory.mktemp("stop"), policy_of(policy=DotPolicy(noise=0.2))
    with open_journal(folder / "journal.jsonl", plan, policy) as journal:
        runner = Runner(
            plan, policy, ToySlots(slots, order), journal, adapter=SAME, actions=folder / "actions", stop=test.read
        )
        stop = runner.run()
        assert stop is not None and stop == test.read(outcomes(plan, journal))
        # Who is ahead of the first open episode stays near it.
        assert len(journal.rows) <= stop.at + 2 * len(TASKS) + slots
    assert stop == Stop("high", 7)


def test_a_policy_that_answers_nonsense_is_refused(tmp_path):
    class Wrong(DotPolicy):
        def act(self, observation, instruction, seeds):
            return super().act(observation, instruction, seeds) * np.float32("nan")

    with pytest.raises(DataError, match="not finite"):
        run(tmp_path, plan_of(), ToySlots(2), policy_of(policy=Wrong()))


def test_the_probe_sees_neighbours_and_place(tmp_path):
    assert neighbours_matter(policy_of(batch=4), INSTRUCTIONS) == ""
    told = neighbours_matter(policy_of(batch=4, policy=DotPolicy(mixes=1e-3)), INSTRUCTIONS)
    assert "actions differ by up to" in told and "batch of 4" in told
    assert neighbours_matter(policy_of(batch=1, policy=DotPolicy(mixes=1e-3)), INSTRUCTIONS) == ""


def test_a_batch_is_filled_and_cut(tmp_path):
    policy = DotPolicy()
    seen = {STATE: np.zeros(2, np.float32), CAMERA: np.zeros((8, 8, 3), np.uint8)}
    answer = ask_filled(policy_of(batch=4, policy=policy), [seen, seen], INSTRUCTIONS[:2], [1, 2])
    assert policy.asked == [4] and answer.chunks.shape == (2, CHUNK, 2) and len(answer.values) == 2
    np.testing.assert_array_equal(answer.chunks[0], policy.act({STATE: seen[STATE][None]}, ["go left"], [1])[0])


def test_plans_take_tasks_in_turn_and_seeds_after_the_last_initial_state():
    keys = plan_of(3 * 6 + 1).keys
    assert [key.task for key in keys[:6]] == ["left", "right", "up"] * 2
    assert [(key.initial_state, key.seed) for key in keys[::3]] == [
        (0, 7),
        (1, 7),
        (2, 7),
        (3, 7),
        (4, 7),
        (0, 8),
        (1, 8),
    ]
    assert len(set(keys)) == len(keys) and len({noise_seed(k, s) for k in keys for s in range(0, 24, 4)}) == 19 * 6
    assert len(make_plan(SUITE, CHUNK, SuiteSettings()).keys) == 12  # the protocol's own
    assert {key.task for key in make_plan(SUITE, CHUNK, SuiteSettings(tasks=("up",))).keys} == {"up"}
    for wrong, told in (({"tasks": ("upp",)}, "up"), ({"episodes": 0}, "1 or more"), ({"execute": 9}, "1 to 8")):
        with pytest.raises(ConfigError, match=told):
            make_plan(SUITE, CHUNK, SuiteSettings(**wrong))


def test_lanes_keep_their_task_and_no_episode_is_given_twice():
    plan = plan_of(30)
    queue = Queue(plan, range(30))
    given_out = [queue.take(n % 3) for n in range(30)]
    assert sorted(given_out) == list(range(30)) and queue.take(0) is None and not queue
    assert all(len({plan.keys[i].task for i in given_out[slot::3]}) == 1 for slot in range(3))
    near = Queue(plan, range(30), window=6)  # no further ahead, in the order read, than 6 from the first open one
    place = {index: at for at, index in enumerate(plan.order)}
    left = set(range(30))
    while near:
        at = place[near.take(0)]
        assert at < min(left) + 6
        left.remove(at)
    assert not left


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 9))
def test_a_test_that_stops_early_reads_whole_rounds_each_in_an_order_of_its_own(tasks, episodes, seed):
    suite = replace(SUITE, tasks=tuple(replace(SUITE.tasks[0], name=f"t{n}") for n in range(tasks)))
    plan = make_plan(suite, CHUNK, SuiteSettings(episodes=episodes + 1, seed=seed))
    assert sorted(plan.order) == list(range(episodes + 1))
    assert [index // tasks for index in plan.order] == [index // tasks for index in range(episodes + 1)]
    assert plan.order == make_plan(suite, CHUNK, SuiteSettings(episodes=episodes + 1, seed=seed)).order
    if tasks > 20 and episodes > 3 * tasks:
        rounds = [[i % tasks for i in plan.order[at : at + tasks]] for at in range(0, 3 * tasks, tasks)]
        assert len({tuple(one) for one in rounds}) == 3 and list(range(tasks)) not in rounds


def test_on_ninety_tasks_of_unequal_difficulty_early_stopping_keeps_what_it_states():
    """Easy tasks first: the suite's own order said "high" in nearly every run at a rate of 0.71."""
    suite = replace(SUITE, tasks=tuple(replace(SUITE.tasks[0], name=f"t{n}") for n in range(90)))
    test = RateTest(0.75, 0.90, 900, least=90).checked()
    for rate, wrong in ((0.71, "high"), (0.93, "low")):
        chances = np.clip(np.linspace(1.6, 0.4, 90) * rate, 0, 1)
        chances += rate - chances.mean()
        chances = np.clip(chances, 0, 1)
        said, naive = [], []
        for run in range(400):
            plan = make_plan(suite, CHUNK, SuiteSettings(episodes=900, seed=run))
            won = np.random.default_rng(run).random(900) < np.tile(chances, 10)
            stop = test.read(won[list(plan.order)].tolist())
            said.append(stop.decision if stop else "undecided")
            first = replace(test, least=1).read(won.tolist())
            naive.append(first.decision if first else "undecided")
            assert stop is None or stop.at >= 90
        assert said.count(wrong) <= 0.05 * len(said)
        if wrong == "high":
            assert naive.count("high") > 0.5 * len(naive), "what it was before"


def test_what_is_missing_is_counted_from_the_journal(tmp_path):
    plan, policy = plan_of(), policy_of()
    with open_journal(tmp_path / "journal.jsonl", plan, policy) as journal:
        assert missing(plan, journal) == list(range(12)) and outcomes(plan, journal) == []
