"""A policy server asked as a policy in this process: the same answers, patience while it is away, no exchange."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import numpy as np
import pytest

from prts_core.errors import ConfigError, ServeError
from prts_core.evaluation.actors import LocalActor, ServerActor, neighbours_matter, open_actor
from prts_core.observation import STATE
from prts_core.serving.server import PolicyServer, ServerConfig, running
from tests.evaluation.toy_lanes import CAMERA, TASKS, DotPolicy

TEXTS = ["go left", "go right", "go up"]
SEEDS = [1, 2**62, 3]


def observation(count: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return {STATE: rng.normal(size=(count, 2)).astype(np.float32), CAMERA: images}


def serving(policy: DotPolicy, port: int = 0, **about) -> contextlib.AbstractContextManager[str]:
    return running(PolicyServer(policy, ServerConfig(port=port, about=about)))


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_server_answers_as_the_policy_itself():
    local = LocalActor(DotPolicy(), {}, batch=3).ask(observation(), TEXTS, SEEDS)
    with serving(DotPolicy(), package_digest="sha256:p") as url:
        actor = open_actor(url, batch=3)
        answer = actor.ask(observation(), TEXTS, SEEDS)
        assert neighbours_matter(actor, [task.instruction for task in TASKS]) == ""
        actor.close()
        silent = ServerActor(url, values=False)
        assert silent.ask(observation(1), TEXTS[:1], SEEDS[:1]).values is None
        silent.close()
    np.testing.assert_array_equal(answer.chunks, local.chunks)
    np.testing.assert_allclose(answer.values, local.values, rtol=1e-6)
    assert actor.identity == {"package_digest": "sha256:p", "contract": DotPolicy().contract.fingerprint}


def test_a_server_that_comes_back_is_waited_for(port):
    with serving(DotPolicy(), port):
        actor = ServerActor(f"ws://127.0.0.1:{port}", batch=2, patience_s=30)
        first = actor.ask(observation(2), TEXTS[:2], SEEDS[:2])
    asked: list = []
    thread = threading.Thread(target=lambda: asked.append(actor.ask(observation(2), TEXTS[:2], SEEDS[:2])))
    thread.start()
    time.sleep(0.3)
    assert not asked
    with serving(DotPolicy(), port):
        thread.join(20)
        np.testing.assert_array_equal(asked[0].chunks, first.chunks)
        actor.close()


def test_patience_ends_and_closing_ends_it_at_once(port):
    with serving(DotPolicy(), port):
        actor, other = (ServerActor(f"ws://127.0.0.1:{port}", patience_s=seconds) for seconds in (0.6, 600))
    with pytest.raises(ServeError, match=r"stayed away.*within 0\.6 s.*finished episodes are kept"):
        actor.ask(observation(1), TEXTS[:1], SEEDS[:1])
    actor.close()
    threading.Timer(0.3, other.close).start()
    with pytest.raises(ServeError, match="stayed away"):
        other.ask(observation(1), TEXTS[:1], SEEDS[:1])


def test_another_policy_at_the_same_address_is_refused(port):
    with serving(DotPolicy(), port, package_digest="sha256:one"):
        actor = ServerActor(f"ws://127.0.0.1:{port}", patience_s=30)
    with serving(DotPolicy(), port, package_digest="sha256:two"):
        with pytest.raises(ServeError, match=r"Another policy is served now.*sha256:two.*sha256:one"):
            actor.ask(observation(1), TEXTS[:1], SEEDS[:1])
        actor.close()


def test_what_cannot_be_asked_is_refused_with_a_cure(tmp_path):
    with pytest.raises(ConfigError, match="ws://host"):
        open_actor("http://host:8000")
    with pytest.raises(ConfigError, match="1 or more"):
        open_actor(str(tmp_path), batch=0)
