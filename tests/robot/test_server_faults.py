"""A robot's client and real servers that are killed, restarted, silent, or come back as somebody else."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.io.errors import ContractError, ServeError
from prts_core.robot.action_queue import ActionQueue
from prts_core.robot.connection import LastingConnection, ServerGone
from prts_core.robot.groot import GrootPolicy
from prts_core.robot.openpi import OpenpiPolicy, PolicyClient
from prts_core.serving.server import PolicyServer, ServerConfig
from prts_core.serving.service import GROOT
from prts_core.serving.versions import Version
from tests.fixtures.running_server import running
from tests.serving.fake_policy import CONTRACT, FakePolicy, Held, groot_observation, observation

SERVER = """
import asyncio, sys
sys.path.insert(0, {root!r})
from prts_core.serving.server import PolicyServer, ServerConfig
from tests.serving.fake_policy import FakePolicy
server = PolicyServer(FakePolicy(), ServerConfig(port={port}))
asyncio.run(server.run(asyncio.Event(), lambda port: print("ready", flush=True)))
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def process(port: int) -> subprocess.Popen:
    code = SERVER.format(root=str(Path(__file__).parents[2]), port=port)
    made = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert made.stdout.readline() == "ready\n"
    return made


def until(done, queue: ActionQueue, most: int = 100_000) -> list[np.ndarray]:
    """Control steps, as fast as they go, until `done()`: the number of steps is no matter of time."""
    acted = []
    for _ in range(most):
        acted.append(queue.next(observation))
        if done():
            return acted
        if queue._look is not None and not queue._look.answer.done():
            time.sleep(0.001)
    raise AssertionError("it never came to it")


def test_a_server_killed_and_restarted_mid_episode(port: int):
    """The robot holds its last action while nobody answers, and goes on by itself with what it sees then."""
    first = process(port)
    policy = OpenpiPolicy(f"ws://127.0.0.1:{port}", patience_s=60)
    with ActionQueue(policy, CONTRACT.contract.control_hz, look_every=1, when_starved="hold") as queue:
        queue.start(observation())
        until(lambda: queue.cadence.looks >= 2, queue)
        first.send_signal(signal.SIGKILL)
        first.wait(60)
        held = until(lambda: queue.cadence.starved >= 3, queue)
        assert all(np.array_equal(action, held[-1]) for action in held[-3:])
        looks = queue.cadence.looks
        second = process(port)
        try:
            until(lambda: queue.cadence.looks >= looks + 2, queue)
            # Of nothing that was seen before the server went.
            assert queue.cadence.discarded == 1 and policy.connection.lost >= 1
        finally:
            second.kill()
            second.wait(60)


def test_patience_ends_with_what_to_do(port: int):
    with running(PolicyServer(FakePolicy(), ServerConfig(port=port))) as url:
        policy = OpenpiPolicy(url, patience_s=0.3)
    with pytest.raises(ServerGone, match=r"stayed away.*within 0\.3 s.*Cure: start it again.*patience_s"):
        policy.chunk(observation(), step=0, delay=None, reset=False)
    policy.close()
    with pytest.raises(ServerGone, match=r"Nobody listens there.*start `prts serve`"):
        OpenpiPolicy(url)


def test_a_server_that_hangs_runs_into_the_time_out():
    thinking = Held()
    with running(PolicyServer(thinking, ServerConfig(port=0))) as url:
        policy = OpenpiPolicy(url, patience_s=0.2)
        policy.connection.client().timeout_s = 0.3
        with pytest.raises(ServerGone, match=r"stayed away.*does not answer.*within 0\.3 s"):
            policy.chunk(observation(), step=0, delay=None, reset=False)
        assert thinking.thinks.is_set() and policy.connection.lost >= 1
        policy.close()
        thinking.go_on.set()


def test_a_hanging_server_ends_no_control_loop_before_its_patience():
    """The loop goes on by the clock of the robot while the question waits: starved steps, then the error."""
    thinking = Held()
    thinking.go_on.set()
    with (
        running(PolicyServer(thinking, ServerConfig(port=0))) as url,
        ActionQueue(OpenpiPolicy(url, patience_s=0.2), 20.0, look_every=1, when_starved="hold") as queue,
    ):
        queue.start(observation())
        queue.policy.connection.client().timeout_s = 0.5
        thinking.go_on.clear()
        with pytest.raises(ServerGone, match="stayed away"):
            until(lambda: False, queue)
        assert queue.cadence.starved > 0
        thinking.go_on.set()


def test_a_restarted_server_of_other_numbers_is_refused(port: int):
    with running(PolicyServer(FakePolicy(), ServerConfig(port=port))) as url:
        policy = OpenpiPolicy(url, patience_s=30)
    other = replace(CONTRACT, contract=replace(CONTRACT.contract, control_hz=10.0))
    told = r"contract\.control_hz: 10\.0 in the server, 20\.0 in the server before"
    again = running(PolicyServer(FakePolicy(contract=other), ServerConfig(port=port)))
    with again, pytest.raises(ContractError, match=told):
        policy.chunk(observation(), step=0, delay=None, reset=False)
    policy.close()


def test_a_refusal_is_told_at_once_and_the_next_question_works():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url:
        policy = OpenpiPolicy(url, patience_s=600)
        with pytest.raises(ServeError, match="unknown key"):
            policy.chunk(observation(extra=1), step=0, delay=None, reset=False)
        assert policy.chunk(observation(), step=0, delay=None, reset=False).shape == (4, 2)
        policy.close()


def test_waiting_grows_up_to_a_limit(monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    now = [0.0]

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout)
            now[0] += timeout
            return False

    def nobody() -> None:
        raise ServerGone("Nobody listens there")

    monkeypatch.setattr("prts_core.robot.connection.time.monotonic", lambda: now[0])
    with pytest.raises(ServerGone, match="within 60 s"):
        LastingConnection(nobody, 60.0, Closing()).ask(lambda client: None)
    assert waited == [0.5, 1, 2, 4, 8, 15, 15] and sum(waited) <= 60


def test_groots_policy_gives_one_robots_actions_side_by_side_over_restarts():
    config = ServerConfig(protocols=(GROOT,), groot_port=0)
    with running(PolicyServer(FakePolicy(), config)) as address:
        policy = GrootPolicy(address, patience_s=60)
        assert policy.keys == ["x", "y"]
        for flat in (False, True):
            chunk = policy.chunk(groot_observation(flat=flat), step=0, delay=None, reset=not flat)
            assert chunk.shape == (4, 2) and chunk.dtype == np.float32
        with pytest.raises(ServeError, match=r"not those of one robot.*\(1, chunk, width\) under x, y"):
            policy.chunk(groot_observation(batch=2), step=0, delay=None, reset=False)
        policy.chunk(groot_observation(), step=0, delay=None, reset=False)
    policy.connection.client().timeout_s = 1.0
    again = replace(config, groot_port=int(address.rpartition(":")[2]))
    with running(PolicyServer(FakePolicy(), again)), ActionQueue(policy, 20.0) as queue:
        queue.start(groot_observation())
        assert queue.next(groot_observation).shape == (2,)


def test_a_silent_server_of_groots_protocol_is_told(port: int):
    with pytest.raises(ServerGone, match=r"does not answer.*within 0\.2 s"):
        GrootPolicy(f"tcp://127.0.0.1:{port}", timeout_s=0.2)


def test_a_robot_comes_back_to_a_version_that_was_normalised_otherwise():
    """It means the same by its numbers. A robot that names the contract it was told is not refused either; one that
    was given a contract of its own is."""
    server = PolicyServer(FakePolicy(), ServerConfig(port=0))
    other = replace(CONTRACT, statistics_digest="sha256:11")
    with running(server) as url:
        lasting, strict = OpenpiPolicy(url), OpenpiPolicy(url, contract=CONTRACT, patience_s=0.5)
        lasting.chunk(observation(), step=0, delay=None, reset=False)
        server.service.versions.offer(Version("2", FakePolicy(contract=other)))
        lasting.connection.drop()
        lasting.chunk(observation(), step=0, delay=None, reset=False)
        with PolicyClient(f"{url}/?contract_fingerprint={other.fingerprint}") as client:
            assert client.metadata["contract_fingerprint"] == other.fingerprint
            client.infer(observation(contract_fingerprint=other.fingerprint))
        strict.connection.drop()
        with pytest.raises(ContractError, match="statistics_digest"):
            strict.chunk(observation(), step=0, delay=None, reset=False)
        lasting.close()
        strict.close()
