"""One policy in several processes: the same answers, errors told, and a process that dies costs one batch."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.io.errors import DataError
from prts_core.policy.observation import STATE, UnderWay
from prts_core.policy.policy import Policy, load_policy, policy_digest
from prts_core.serving.engine import Engine, Limits, Reply, warm_up
from prts_core.serving.observations import Observation
from prts_core.serving.replicas import ProcessLost, Replica
from prts_core.serving.sessions import Session
from prts_core.serving.versions import Version
from prts_core.sim.suites import suite
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy

SIZED = replace(MODEL, image_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("replicas") / "policy", SIZED, suite("tests.fixtures.toy_family:toy"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(folder, "fp32", "cpu")


@pytest.fixture(scope="module")
def replica(folder: Path, policy: Policy) -> Iterator[Replica]:
    made = Replica(policy, folder, "fp32", "cpu", policy_digest(folder))
    made.wait()
    yield made


def seen(policy: Policy, count: int = 2) -> dict[str, np.ndarray]:
    rng, meant = np.random.default_rng(0), policy.contract.contract
    images = {c.key: rng.integers(0, 255, (count, c.height, c.width, 3), np.uint8) for c in meant.cameras}
    return images | {STATE: rng.normal(0, 0.3, (count, len(meant.state))).astype(np.float32)}


def test_a_replica_answers_as_the_policy_does(policy: Policy, replica: Replica):
    shown, length = seen(policy), policy.contract.chunk_length
    rows = np.zeros((2, length, len(policy.contract.contract.action)), np.float32)
    under_way = UnderWay(rows, np.array([1, 0]), np.array([1, length]))
    for more in ({}, {"value": True}, {"draws": 3}, {"under_way": under_way}):
        ours = policy.answer(shown, ["push", "pull"], [1, 2], **more)
        theirs = replica.answer(shown, ["push", "pull"], [1, 2], **more)
        np.testing.assert_allclose(theirs.actions, ours.actions, atol=1e-6)
        assert (theirs.values is None) == (ours.values is None)
    assert replica.contract == policy.contract and not replica.speaks


def test_what_a_replica_refuses_is_told_and_it_lives_on(policy: Policy, replica: Replica):
    pid = replica.pid
    with pytest.raises(DataError, match="missing"):
        replica.answer({STATE: seen(policy)[STATE]}, ["push", "pull"], [1, 2])
    assert replica.pid == pid
    replica.answer(seen(policy), ["push", "pull"], [1, 2])


def test_a_replica_that_dies_loads_anew_and_says_no_traceback(policy: Policy, replica: Replica):
    before = replica.pid
    os.kill(before, signal.SIGKILL)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLost) as caught:
        replica.answer(seen(policy), ["push", "pull"], [1, 2])
    assert "SIGKILL" in replica.last_words and "words" not in str(caught.value)
    replica.wait()
    assert replica.ready and replica.pid != before and replica.unwell is None
    assert np.isfinite(replica.answer(seen(policy), ["push", "pull"], [1, 2]).actions).all()


def test_a_device_that_is_none_is_told_with_its_last_words_and_given_up(policy: Policy, folder: Path):
    made = Replica(policy, folder, "fp32", "nowhere", policy_digest(folder))
    with pytest.raises(ProcessLost, match="nowhere") as caught:
        warm_up(Version("1", policy, replicas=(made,)), (made,), Limits())
    assert "Error" in str(caught.value) and "--devices" in str(caught.value)
    for _ in range(2):
        with pytest.raises(ProcessLost):
            made.wait()
    assert made.unwell is not None and "nowhere" in made.unwell and not made.ready


def test_a_folder_that_changes_is_not_loaded_under_the_old_name(policy: Policy, folder: Path, tmp_path: Path):
    own = tmp_path / "policy"
    shutil.copytree(folder, own)
    made = Replica(policy, own, "fp32", "cpu", policy_digest(own))
    made.wait()
    config = own / "norm_stats.json"
    config.write_text(config.read_text() + "\n")
    os.kill(made.pid, signal.SIGKILL)
    with pytest.raises(ProcessLost):
        made.answer(seen(policy), ["push", "pull"], [1, 2])
    with pytest.raises(ProcessLost, match=r"changed|CheckpointError"):
        made.wait()


def test_two_processes_share_what_is_asked(policy: Policy, replica: Replica):
    """Robots that ask at once are answered by both, each as it would be alone."""
    version = Version("1", policy, replicas=(replica,))
    engine = Engine(Limits(), replicas=1)
    shown = seen(policy, 6)
    cameras = [camera.key for camera in policy.contract.contract.cameras]
    asked = [Observation({k: shown[k][i] for k in cameras}, shown[STATE][i], "push", seed=i) for i in range(6)]

    async def talk() -> list[Reply]:
        serving = asyncio.create_task(engine.run())
        try:
            sessions = [Session(str(i), version) for i in range(6)]
            return await asyncio.gather(*(engine.ask(one, own) for one, own in zip(asked, sessions, strict=True)))
        finally:
            serving.cancel()
            engine.close()

    assert warm_up(version, (policy, replica), engine.limits) > 0
    replies = asyncio.run(asyncio.wait_for(talk(), 60))
    assert [reply.batch for reply in replies] == [3] * 6
    for i, reply in enumerate(replies):
        alone = policy.answer({k: v[i] for k, v in shown.items()}, "push", i)
        np.testing.assert_allclose(reply.actions, alone.actions, atol=1e-4)
