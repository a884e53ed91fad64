"""A policy server asked as a policy in this process: the same answers, patience while it is away, no exchange."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from prts_core.delivery.open_policy import open_policy
from prts_core.io.errors import ConfigError, ContractError, ServeError
from prts_core.io.msgpack import pack, unpack
from prts_core.io.threads import torch_threads
from prts_core.policy.observation import STATE
from prts_core.rollout.local_policy import LocalPolicy, ask_filled, neighbours_matter
from prts_core.rollout.remote_policy import RemotePolicy, named_contract
from prts_core.serving.server import PolicyServer, ServerConfig
from tests.fixtures.running_server import running
from tests.rollout.toy_slots import CAMERA, CONTRACT, TASKS, DotPolicy

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
    local = LocalPolicy(DotPolicy(), {}, batch=3).ask(observation(), TEXTS, SEEDS)
    with serving(DotPolicy(), package_digest="sha256:p") as url:
        policy = open_policy(url, batch=3)
        answer = policy.ask(observation(), TEXTS, SEEDS)
        assert neighbours_matter(policy, [task.instruction for task in TASKS]) == ""
        policy.close()
        silent = RemotePolicy(url, values=False)
        assert silent.ask(observation(1), TEXTS[:1], SEEDS[:1]).values is None
        silent.close()
    np.testing.assert_array_equal(answer.chunks, local.chunks)
    np.testing.assert_allclose(answer.values, local.values, rtol=1e-6)
    assert policy.identity == {"package_digest": "sha256:p", "contract": DotPolicy().contract.fingerprint}


def test_a_policy_computes_with_the_threads_it_was_given_whoever_asks():
    """How many were set before, in which thread, must not show in a result's bits."""
    seen = []

    class Counting(DotPolicy):
        def act(self, observation, instruction, seeds):
            seen.append(torch.get_num_threads())
            return super().act(observation, instruction, seeds)

    for before in (1, 3):
        with torch_threads(before):
            for threads in (2, None):
                policy = LocalPolicy(Counting(), {}, batch=3, threads=threads)
                policy.ask(observation(), TEXTS, SEEDS)
                with ThreadPoolExecutor(1) as other:
                    other.submit(policy.ask, observation(), TEXTS, SEEDS).result()
            assert torch.get_num_threads() == before
    assert seen == [2, 2, 1, 1, 2, 2, 3, 3]


def test_a_server_that_comes_back_is_waited_for(port):
    with serving(DotPolicy(), port):
        policy = RemotePolicy(f"ws://127.0.0.1:{port}", batch=2, patience_s=60)
        first = policy.ask(observation(2), TEXTS[:2], SEEDS[:2])
    asked: list = []
    thread = threading.Thread(target=lambda: asked.append(policy.ask(observation(2), TEXTS[:2], SEEDS[:2])))
    thread.start()
    time.sleep(0.3)
    assert not asked
    with serving(DotPolicy(), port):
        thread.join(60)
        assert not thread.is_alive()
        np.testing.assert_array_equal(asked[0].chunks, first.chunks)
        policy.close()


def test_patience_ends_and_closing_ends_it_at_once(port):
    with serving(DotPolicy(), port):
        policy, other = (RemotePolicy(f"ws://127.0.0.1:{port}", patience_s=seconds) for seconds in (0.6, 600))
    with pytest.raises(ServeError, match=r"stayed away.*within 0\.6 s.*finished episodes are kept"):
        policy.ask(observation(1), TEXTS[:1], SEEDS[:1])
    policy.close()
    threading.Timer(0.3, other.close).start()
    with pytest.raises(ServeError, match="stayed away"):
        other.ask(observation(1), TEXTS[:1], SEEDS[:1])


def test_another_policy_at_the_same_address_is_refused(port):
    with serving(DotPolicy(), port, package_digest="sha256:one"):
        policy = RemotePolicy(f"ws://127.0.0.1:{port}", patience_s=30)
    with serving(DotPolicy(), port, package_digest="sha256:two"):
        with pytest.raises(ServeError, match=r"Another policy is served now.*sha256:two.*sha256:one"):
            policy.ask(observation(1), TEXTS[:1], SEEDS[:1])
        policy.close()


@contextlib.contextmanager
def foreign(seen: list, reply=None, metadata=None, port: int = 0):
    """A server as openpi's: metadata at the handshake, an answer without seeds or values; it says nothing of itself."""

    def handle(connection) -> None:
        connection.send(pack(metadata or {}))
        with contextlib.suppress(ConnectionClosed):
            while True:
                seen.append(unpack(connection.recv()))
                answer = {"actions": np.full((6, 2), float(len(seen)), np.float32)} if reply is None else reply
                connection.send(pack(answer | {"server_timing": {"infer_ms": 1.0}}))

    with serve(handle, "127.0.0.1", port, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join(10)


def test_a_server_that_says_nothing_is_asked_once_its_contract_is_named():
    seen: list = []
    with foreign(seen) as url:
        with pytest.raises(ServeError, match=r"does not say what its numbers mean.*--contract, with a"):
            RemotePolicy(url)
        policy = open_policy(url, contract=CONTRACT)
        assert policy.contract.chunk_length == 6 and policy.contract.contract == CONTRACT
        answer = ask_filled(policy, [{key: value[0] for key, value in observation(1).items()}], TEXTS[:1], SEEDS[:1])
        policy.close()
    assert answer.values is None and (answer.chunks == 2.0).all()
    assert set(seen[1]) == {"observation/state", "observation/top", "prompt"}, "openpi's keys, no seed"
    np.testing.assert_array_equal(seen[1]["observation/top"], observation(1)[CAMERA][0])
    assert policy.identity["server"] == url and policy.identity["unverified"].startswith("the server says neither")
    assert policy.identity["contract"] == CONTRACT.fingerprint and "package_digest" not in policy.identity


def test_another_foreign_server_is_refused(port):
    with foreign([], port=port) as url:
        policy = RemotePolicy(url, contract=CONTRACT, patience_s=20)
        policy.connections[0].client().close()
    with foreign([], metadata={"config": "another"}, port=port):
        with pytest.raises(ServeError, match="Another policy is served now"):
            policy.ask(observation(1), TEXTS[:1], SEEDS[:1])
        policy.close()


@pytest.mark.parametrize(
    "reply, told",
    [
        ({"actions": np.zeros((6, 7), np.float32)}, r"not those of the contract.*\(6, 7\)"),
        ({"actions": np.zeros(7, np.float32)}, "are no chunk"),
        ({"actions": np.array([["a"]])}, "are no chunk"),
        ({"action": 1}, "has no actions"),
    ],
)
def test_what_a_foreign_server_must_not_answer(reply, told):
    with foreign([], reply) as url, pytest.raises(ServeError, match=told):
        RemotePolicy(url, contract=CONTRACT)


def test_a_contract_named_against_the_servers_own_is_refused():
    with serving(DotPolicy()) as url:
        RemotePolicy(url, contract=CONTRACT).close()
        with pytest.raises(ContractError, match="control_hz"):
            RemotePolicy(url, contract=replace(CONTRACT, control_hz=5))


def test_contracts_are_named_by_suite_file_or_folder(tmp_path):
    assert named_contract("suite", CONTRACT) is CONTRACT
    DotPolicy().contract.save(tmp_path / "policy_contract.json")
    CONTRACT.save(tmp_path / "contract.json")
    for name in (tmp_path, tmp_path / "policy_contract.json", tmp_path / "contract.json"):
        assert named_contract(str(name), None) == CONTRACT
    with pytest.raises(ConfigError, match="no such contract"):
        named_contract(str(tmp_path / "absent"), CONTRACT)
    with pytest.raises(ConfigError, match="own contract is what counts"):
        open_policy(str(tmp_path), contract=CONTRACT)


def test_what_cannot_be_asked_is_refused_with_a_cure(tmp_path):
    with pytest.raises(ConfigError, match="ws://host"):
        open_policy("http://host:8000")
    with pytest.raises(ConfigError, match="1 or more"):
        open_policy(str(tmp_path), batch=0)
