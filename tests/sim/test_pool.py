"""Workers under supervision: whatever a worker does costs its own episode, and nothing is left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.io.errors import SimulatorError
from prts_core.sim import protocol
from prts_core.sim.pool import Pool, Timeouts, WorkerLaunch, WorkerLost, WorkerRefused, launch_for
from prts_core.sim.suite import EpisodeKey

ROOT = Path(__file__).parents[2]
FAMILY = "tests.fixtures.toy_family"
LAUNCH = WorkerLaunch(FAMILY)
LIMIT_S = 4.0  # a worker that is well answers within it on a loaded machine, too
HASTY = WorkerLaunch(FAMILY, timeouts=Timeouts(start=240.0, reset=LIMIT_S, step=LIMIT_S, action=0.0, observe=LIMIT_S))
KEY = EpisodeKey("toy", "push", 0, 7)
STILL = np.zeros((3, 2), np.float32)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(LAUNCH, 2) as made:
        yield made


@pytest.fixture(scope="module")
def hasty() -> Iterator[Pool]:
    """For what a worker does not answer at all."""
    with Pool(HASTY, 2) as made:
        yield made


def pid_of(pool: Pool, slot: int) -> int:
    worker = pool.workers[slot]
    assert worker is not None
    return worker.process.pid


def gone(pid: int, seconds: float = 60.0) -> bool:
    """Whether the process ends within that time. A zombie has ended, once none of its threads is left: until then its
    parent is told nothing."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            ended = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            if ended and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1:
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_an_episode(pool: Pool):
    reply = pool.ask(0, protocol.reset(KEY, render=True))
    assert reply["instruction"] == "push it" and reply["frame"].shape == (16, 16, 3)
    assert reply["observation"]["observation.state"].dtype == np.float32
    assert reply["observation"]["observation.images.eye"].shape == (8, 8, 3)
    still = pool.ask(0, protocol.step(STILL, observe=False, render=2))
    assert (still["steps"], still["observation"], still["frames"].shape) == (3, None, (1, 16, 16, 3))
    right = np.tile(np.array([1.0, 0.0], np.float32), (8, 1))
    reached = pool.ask(0, protocol.step(right))
    assert reached["steps"] < 8 and reached["successes"].tolist() == [False] * (reached["steps"] - 1) + [True]
    assert reached["rewards"].tolist() == reached["successes"].astype(float).tolist()
    on = pool.ask(0, protocol.step(right[:4], ignore_success=True))
    assert on["steps"] == 4 and on["successes"].all()
    assert pool.ask(0, protocol.state())["state"][0] > 1.0
    assert np.array_equal(pool.ask(0, protocol.observe())["observation"]["observation.state"][0:1] > 1.0, [True])


def test_a_key_is_an_episode_in_any_process(pool: Pool):
    actions = np.random.default_rng(0).normal(0.0, 0.3, (6, 2)).astype(np.float32)
    states = []
    for slot, others in ((0, 0), (1, 3), (0, 2)):
        for other in range(others):
            pool.ask(slot, protocol.reset(EpisodeKey("toy", "shove", other % 2, 1)))
            pool.ask(slot, protocol.step(STILL))
        pool.ask(slot, protocol.reset(KEY))
        pool.ask(slot, protocol.step(actions, ignore_success=True))
        states.append(pool.ask(slot, protocol.state())["state"].tobytes())
    assert states[0] == states[1] == states[2]


def test_replies_come_as_they_are_ready(hasty: Pool):
    pool = hasty
    pool.ask(0, protocol.reset(KEY))
    pool.send(1, protocol.reset(KEY, perturbation={"do": "sleep", "when": "reset"}))
    pool.send(0, protocol.observe())
    slot, reply = pool.wait() or (None, None)
    assert slot == 0 and isinstance(reply, dict)
    assert pool.wait(timeout=0.05) is None, "the other is still asleep"
    pool.send(0, protocol.observe())
    answering = pool.workers[0]
    assert answering is not None and select.select([answering.socket], [], [], 60)[0]
    slot, reply = pool.wait(timeout=0.0) or (None, None)
    assert slot == 0 and isinstance(reply, dict), "what has arrived is read without waiting"
    assert pool.wait(timeout=0.0) is None
    slot, reply = pool.wait() or (None, None)
    assert slot == 1 and isinstance(reply, WorkerLost)


@pytest.mark.parametrize(
    ("do", "told"),
    [
        ("raise", "RuntimeError: the toy broke"),
        ("kill", "ended by SIGKILL"),
        ("exit", "ended with status 0"),
        ("stop", f"gave no answer to 'step' in {LIMIT_S:g} s"),
        ("sleep", f"gave no answer to 'step' in {LIMIT_S:g} s"),
        ("garbage", "spoke nonsense"),
        ("oversized", "a frame of 4294967295 bytes"),
        ("wrong", "spoke nonsense"),
    ],
)
def test_a_lost_worker_costs_its_episode_only(pool: Pool, hasty: Pool, do: str, told: str):
    if "no answer" in told:
        pool = hasty
    pool.ask(0, protocol.reset(KEY))
    pool.ask(1, protocol.reset(KEY, perturbation={"do": do}))
    lost, other = pid_of(pool, 1), pid_of(pool, 0)
    pool.send(0, protocol.step(STILL))
    pool.send(1, protocol.step(STILL))
    replies = dict(filter(None, (pool.wait(), pool.wait())))
    assert isinstance(replies[0], dict) and replies[0]["steps"] == 3 and pid_of(pool, 0) == other
    assert isinstance(replies[1], WorkerLost) and told in str(replies[1]) and "step" in str(replies[1])
    assert gone(lost)
    assert pool.ask(1, protocol.reset(KEY))["instruction"] == "push it"
    assert pool.ask(1, protocol.step(STILL))["steps"] == 3


def test_chatter_is_no_message(pool: Pool):
    pool.ask(0, protocol.reset(KEY, perturbation={"do": "print"}))
    assert pool.ask(0, protocol.step(STILL))["steps"] == 3


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_between_two_messages(hasty: Pool, sign: int):
    pool = hasty
    pool.ask(0, protocol.reset(KEY))
    os.kill(pid_of(pool, 0), sign)
    with pytest.raises(WorkerLost):
        pool.ask(0, protocol.step(STILL))
    pool.ask(0, protocol.reset(KEY))
    os.kill(pid_of(pool, 0), signal.SIGKILL)
    assert gone(pid_of(pool, 0))
    assert pool.ask(0, protocol.reset(KEY))["instruction"] == "push it", "between two episodes nothing is lost"


def test_every_message_has_one_answer_however_workers_die():
    """Slots run episodes of three chunks while workers are killed at random; a lost episode is begun again."""
    rng = np.random.default_rng(0)
    wanted = {(slot, number) for slot in range(3) for number in range(4)}
    ends: dict[tuple[int, int], bytes] = {}
    at, chunk = dict.fromkeys(range(3), 0), dict.fromkeys(range(3), 0)

    def message(slot: int) -> dict:
        key = EpisodeKey("toy", "drawn", 10 * slot + at[slot], 7)
        if chunk[slot] == 0:
            return protocol.reset(key, observe=False)
        return protocol.state() if chunk[slot] == 4 else protocol.step(STILL, observe=False)

    with Pool(LAUNCH, 3) as pool:
        for slot in range(3):
            pool.send(slot, message(slot))
        sent, answers, kills = 3, 0, 0
        while len(ends) < len(wanted):
            if rng.random() < 0.1:
                victim = pool.workers[int(rng.integers(3))]
                if victim is not None:
                    kills += 1
                    os.kill(victim.process.pid, signal.SIGKILL)
            answered = pool.wait()
            assert answered is not None
            slot, reply = answered
            answers += 1
            if isinstance(reply, WorkerLost):
                chunk[slot] = 0
            elif chunk[slot] == 4:
                assert (slot, at[slot]) not in ends
                ends[slot, at[slot]] = reply["state"].tobytes()
                at[slot], chunk[slot] = at[slot] + 1, 0
            else:
                chunk[slot] += 1
            if at[slot] < 4:
                pool.send(slot, message(slot))
                sent += 1
        assert answers == sent and not any(pool.under_way) and 0 < pool.lost <= kills
    assert set(ends) == wanted
    with Pool(LAUNCH) as calm:
        for (slot, number), state in ends.items():
            calm.ask(0, protocol.reset(EpisodeKey("toy", "drawn", 10 * slot + number, 7), observe=False))
            calm.ask(0, protocol.step(np.zeros((9, 2)), observe=False, ignore_success=True))
            assert calm.ask(0, protocol.state())["state"].tobytes() == state


def test_what_is_wrong_is_refused_and_the_worker_lives(pool: Pool):
    pool.ask(0, protocol.reset(KEY))
    before = pid_of(pool, 0)
    wrong = {
        "no such suite": protocol.reset(EpisodeKey("toys", "push", 0, 7)),
        "did you mean 'push'": protocol.reset(EpisodeKey("toy", "posh", 0, 7)),
        "0 to 2": protocol.reset(EpisodeKey("toy", "push", 3, 7)),
        "A seed is negative": protocol.reset(EpisodeKey("toy", "push", 0, -1)),
        "No episode is under way": protocol.observe(),
        "wrong fields": {"kind": "observe", "more": 1},
        "step.observe": {**protocol.step(STILL), "observe": 1},
    }
    for told, message in wrong.items():
        with pytest.raises(WorkerRefused, match=told):
            pool.ask(0, message)
    pool.ask(0, protocol.reset(KEY))
    for actions in (np.zeros((2, 3)), np.zeros((0, 2)), np.full((1, 2), np.nan)):
        with pytest.raises(WorkerRefused, match="Actions that the suite cannot take"):
            pool.ask(0, protocol.step(actions))
    assert pool.ask(0, protocol.step(STILL))["steps"] == 3 and pid_of(pool, 0) == before


def test_the_experts_episode(pool: Pool):
    message = protocol.demonstrate(KEY, noise=0.2, noise_seed=3, tail_steps=2)
    made = pool.ask(0, message)
    rows = made["success_row"] + 3
    assert made["actions"].shape == made["executed"].shape == made["proprio"].shape == (rows, 2)
    assert made["images"]["observation.images.eye"].shape == (rows, 8, 8, 3) and made["phases"] == ["push"] * rows
    assert (made["executed"] != made["actions"]).any(axis=0).tolist() == [True, False]
    again = pool.ask(1, message)
    assert again["states"].tobytes() == made["states"].tobytes()
    assert pool.ask(0, protocol.demonstrate(KEY, max_steps=1, images=False))["success_row"] is None


@pytest.mark.parametrize("do", ["raise", "kill", "garbage", "exit"])
def test_a_simulator_that_cannot_be_made(do: str):
    launch = WorkerLaunch(FAMILY, settings={"do": do}, timeouts=LAUNCH.timeouts)
    with Pool(launch) as pool:
        for _ in range(2):
            with pytest.raises(WorkerLost, match="starting"):
                pool.ask(0, protocol.reset(KEY))
        with pytest.raises(SimulatorError, match="3 in a row did not"):
            pool.ask(0, protocol.reset(KEY))


def test_a_simulator_that_hangs_while_it_is_made():
    launch = WorkerLaunch(FAMILY, settings={"do": "sleep"}, timeouts=Timeouts(start=1.5))
    with Pool(launch) as pool, pytest.raises(WorkerLost, match=r"gave no answer to '(handshake|build)'"):
        pool.ask(0, protocol.reset(KEY))


def test_a_family_that_is_not_there():
    launch = WorkerLaunch("tests.fixtures.no_such_family", timeouts=LAUNCH.timeouts)
    with Pool(launch) as pool, pytest.raises(WorkerLost, match="ModuleNotFoundError"):
        pool.ask(0, protocol.reset(KEY))


def test_a_python_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = Pool(WorkerLaunch(FAMILY, python=Path("no-python")))
    with pytest.raises(SimulatorError, match=r"no-python.*prts sim install"):
        pool.ask(0, protocol.reset(KEY))


PARENT = """
import sys, time
from tests.sim.test_pool import FAMILY, KEY
from prts_core.sim import protocol
from prts_core.sim.pool import WorkerLaunch, Pool
pool = Pool(WorkerLaunch(FAMILY), 2)
pool.ask(0, protocol.reset(KEY, perturbation={"do": sys.argv[1]}))
pool.ask(1, protocol.reset(KEY))
pool.send(0, protocol.step([[0.0, 0.0]]))
time.sleep(0.3)
print(*(worker.process.pid for worker in pool.workers), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("do", ["sleep", "stop"])
def test_no_worker_outlives_its_runner(do: str):
    """The runner is killed while one worker computes (or is stopped) and the other waits."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, do],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    assert all(gone(pid) for pid in pids)


def test_closing_leaves_no_process():
    with Pool(replace(LAUNCH, timeouts=Timeouts(close=0.5)), 2) as pool:
        pool.ask(0, protocol.reset(KEY))
        pool.send(1, protocol.reset(KEY, perturbation={"do": "stop", "when": "reset"}))
        pids = [pid_of(pool, 0), pid_of(pool, 1)]
    assert all(gone(pid, 0.0) or not Path(f"/proc/{pid}").exists() for pid in pids)
    with pool:
        assert pool.ask(1, protocol.reset(KEY))["instruction"] == "push it", "what is sent later starts another"


def test_threads_and_renderer_are_settings():
    variables = WorkerLaunch(FAMILY, threads=1, gl="osmesa").environment()
    assert {variables[name] for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS")} == {"1"}
    assert variables["MUJOCO_GL"] == variables["PYOPENGL_PLATFORM"] == "osmesa"
    assert WorkerLaunch(FAMILY, threads=3).environment()["LP_NUM_THREADS"] == "3"
    assert WorkerLaunch(FAMILY, variables={"LP_NUM_THREADS": "2"}).environment()["LP_NUM_THREADS"] == "2"


def test_a_suite_names_its_family():
    assert launch_for(f"{FAMILY}:toy").family == FAMILY and launch_for("metaworld").family == "metaworld"
