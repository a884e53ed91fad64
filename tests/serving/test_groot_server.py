"""GR00T's protocol over real sockets: answers, refusals, slow policies, many clients, keys, limits and a clean end."""

from __future__ import annotations

import asyncio
import socket as sockets
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq

from prts_core.io.errors import ServeError
from prts_core.io.msgpack import Limits
from prts_core.policy.client import PolicyClient, ServerGone
from prts_core.policy.observation import STATE
from prts_core.serving.protocols.groot import PENDING
from prts_core.serving.protocols.groot_arrays import Dialect, decode, encode
from prts_core.serving.protocols.groot_client import GrootClient
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, OPENPI, ServerConfig
from tests.fixtures.running_server import addresses, running
from tests.serving.fake_policy import CONTRACT, FakePolicy, Held, groot_observation, observation

KEY = "long-enough"


def server(policy: FakePolicy | None = None, **config: Any) -> PolicyServer:
    return PolicyServer(policy or FakePolicy(), ServerConfig(**{"groot_port": 0, "protocols": (GROOT,)} | config))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(server()) as found:
        yield found


@contextmanager
def dealer(address: str) -> Iterator[zmq.Socket]:
    """A socket that sends and takes whatever parts it likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        for option, value in ((zmq.LINGER, 0), (zmq.RCVTIMEO, 60_000), (zmq.SNDTIMEO, 60_000)):
            socket.setsockopt(option, value)
        socket.connect(address)
        yield socket


def exchange(address: str, *parts: bytes) -> Any:
    with dealer(address) as socket:
        socket.send_multipart([b"", *parts])
        empty, answer = socket.recv_multipart()
        assert empty == b""
        return decode(answer)[0]


def expected(batch: int, seeds: list[int], prompt: str = "open the faucet") -> np.ndarray:
    """(B, 4, 2), what the policy itself says to `groot_observation(batch)`."""
    told = groot_observation(batch)
    seen = {f"observation.images.{name}": array[:, 0] for name, array in told["video"].items()}
    seen[STATE] = np.concatenate([array[:, 0] for array in told["state"].values()], axis=1)
    return FakePolicy().act(seen, [prompt] * batch, seeds)


# ---- what works ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_actions_come_back_by_key_and_a_seed_repeats_them(address, dialect, flat, batch):
    with GrootClient(address, dialect=dialect) as client:
        actions, info = client.get_action(groot_observation(batch, flat=flat))
        assert list(actions) == (["action.x", "action.y"] if flat else ["x", "y"])
        assert all(a.shape == (batch, 4, 1) and a.dtype == np.float32 for a in actions.values())
        assert info["infer_ms"] >= 0 and info["queue_ms"] >= 0 and "value" not in info
        seeds = info["seed"]
        again, info = client.get_action(groot_observation(batch, flat=flat), {"seed": seeds, "value": True})
    found = np.concatenate(list(again.values()), axis=2)
    np.testing.assert_array_equal(found, expected(batch, seeds))
    np.testing.assert_array_equal(found, np.concatenate(list(actions.values()), axis=2))
    assert len(info["value"]) == batch and info["seed"] == seeds


def test_a_batch_of_nothing_is_answered_with_nothing(address):
    with GrootClient(address) as client:
        actions, info = client.get_action(groot_observation(0))
    assert {key: array.shape for key, array in actions.items()} == {"x": (0, 4, 1), "y": (0, 4, 1)}
    assert info["seed"] == []


def test_both_protocols_are_one_policy():
    policy = FakePolicy()
    both = server(policy, port=0, protocols=(OPENPI, GROOT), about={"model": "toy"})
    with addresses(both) as found, PolicyClient(found[OPENPI]) as robot, GrootClient(found[GROOT]) as other:
        told = exchange(found[GROOT], encode({"endpoint": "get_policy_contract"}))
        assert told | {"protocol": OPENPI, "keys": robot.metadata["keys"]} == robot.metadata
        actions, _ = other.get_action(groot_observation(), {"seed": 7})
        np.testing.assert_array_equal(
            np.concatenate(list(actions.values()), 2)[0], robot.infer(observation(), seed=7)["actions"]
        )
        with urllib.request.urlopen(found[OPENPI].replace("ws:", "http:") + "/healthz", timeout=60) as reply:
            assert reply.status == 200
    assert len(policy.threads) == 1  # one engine


def test_keys_can_be_grouped_and_cameras_renamed():
    config = {
        "groot_keys": {"state.pose": ("y", "x"), "action.both": ("x", "y")},
        "aliases": {"front": "observation.images.top"},
    }
    with running(server(**config)) as address, GrootClient(address) as client:
        configs = client.get_modality_config()
        assert configs["state"].modality_keys == ["pose", "gripper"] and configs["action"].modality_keys == ["both"]
        told = groot_observation()
        told["video"]["front"] = told["video"].pop("top")
        told["state"]["pose"] = np.concatenate([told["state"].pop("y"), told["state"].pop("x")], 2)
        actions, _ = client.get_action(told, {"seed": 3})
        np.testing.assert_array_equal(actions["both"], expected(1, [3]))


def test_samples_of_one_request_and_of_several_clients_are_answered_together():
    policy = FakePolicy(delay_s=0.05)
    with running(server(policy, max_batch=4, max_clients=12)) as address:

        def robot(number: int) -> bool:
            with GrootClient(address) as client:
                for turn in range(3):
                    actions, _ = client.get_action(groot_observation(2), {"seed": [number, turn]})
                    found = np.concatenate(list(actions.values()), 2)
                    np.testing.assert_allclose(found, expected(2, [number, turn]), rtol=1e-5)
            return True

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(robot, range(6)))
    assert sum(policy.batches) == 36 and max(policy.batches) == 4


# ---- one slow inference --------------------------------------------------------------------------------------------
def test_nobody_waits_for_another_clients_inference():
    policy = Held()
    with running(server(policy, max_batch=1)) as address, ThreadPoolExecutor(2) as pool:
        clients = [GrootClient(address) for _ in range(4)]
        slow = pool.submit(clients[0].get_action, groot_observation(), {"seed": 1})
        assert policy.thinks.wait(60)
        try:
            for client in clients[1:3]:  # two at once, and each in turn
                client.ping(timeout_s=20)
                assert client.get_modality_config() and client.reset() == {"cleared_sessions": []}
                with pytest.raises(ServeError, match="lacks a key"):
                    client.get_action({"state": {}})
            second = pool.submit(clients[3].get_action, groot_observation(), {"seed": 2})
            assert not slow.done() and not second.done()
        finally:
            policy.go_on.set()
        for number, future in ((1, slow), (2, second)):
            actions, _ = future.result(60)
            np.testing.assert_array_equal(np.concatenate(list(actions.values()), 2), expected(1, [number]))
        for client in clients:
            client.close()


def test_a_client_that_does_not_wait_for_answers_gets_them_in_order_up_to_a_limit():
    policy = Held()
    with running(server(policy)) as address, dealer(address) as socket, GrootClient(address) as other:
        ask = {"endpoint": "get_action", "data": {"observation": groot_observation(), "options": {"seed": 5}}}
        socket.send_multipart([b"", encode(ask)])
        assert policy.thinks.wait(60)
        for _ in range(PENDING):
            socket.send_multipart([b"", encode({"endpoint": "ping"})])
        refused = decode(socket.recv_multipart()[1])[0]
        assert "asks without waiting" in refused["error"]
        other.ping(timeout_s=20)
        policy.go_on.set()
        first, *others = [decode(socket.recv_multipart()[1])[0] for _ in range(PENDING)]
        assert first[1]["seed"] == [5] and all(other["status"] == "ok" for other in others)


def test_one_client_too_many_is_told_and_may_ask_again():
    policy = Held()
    full = server(policy, max_clients=2)
    with running(full) as address, ThreadPoolExecutor(2) as pool:
        clients = [GrootClient(address) for _ in range(3)]
        waiting = [pool.submit(client.get_action, groot_observation()) for client in clients[:2]]
        until = time.monotonic() + 60
        while full.clients < 2 and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(ServeError, match="already has 2 clients; at most 2"):
            clients[2].get_action(groot_observation())
        clients[2].ping(timeout_s=20)
        policy.go_on.set()
        assert all(future.result(60) for future in waiting) and clients[2].get_action(groot_observation())
        for client in clients:
            client.close()


def test_a_slow_policy_runs_into_the_timeout():
    policy = Held()
    with running(server(policy, request_timeout_s=0.1)) as address, GrootClient(address) as client:
        with pytest.raises(ServeError, match="did not answer in time"):
            client.get_action(groot_observation())
        policy.go_on.set()


def test_a_client_that_disappears_frees_its_place():
    policy = Held()
    with running(server(policy, max_clients=1)) as address:
        with dealer(address) as socket:
            socket.send_multipart([b"", encode({"data": {"observation": groot_observation()}})])
            assert policy.thinks.wait(60)
        policy.go_on.set()
        with GrootClient(address) as client:
            until = time.monotonic() + 60
            while True:
                try:
                    client.get_action(groot_observation())
                    break
                except ServeError as err:
                    assert "at most 1" in str(err) and time.monotonic() < until
                    time.sleep(0.02)


# ---- what is refused -----------------------------------------------------------------------------------------------
def changed(**changes: Any) -> dict[str, Any]:
    return groot_observation(flat=True) | {key.replace("__", "."): value for key, value in changes.items()}


@pytest.mark.parametrize(
    "told, options, message",
    [
        (changed(state__x=np.zeros((1, 1, 2), np.float32)), None, "another width"),
        (changed(state__x=np.full((1, 1, 1), np.nan, np.float32)), None, "x = nan"),
        (changed(state__x=np.zeros((1, 1, 1), ">f4")), None, "another form"),
        (changed(video__top=np.zeros((1, 1, 16, 8, 3), np.uint8)), None, r"\(16, 8, 3\)"),
        (changed(annotation__human__action__task_description=["x" * 3000]), None, "at most 2000 characters"),
        (groot_observation(9), None, "at most 8"),
        ([1], None, "mapping with text keys"),
        (groot_observation(), [1], "Options are a mapping"),
        (groot_observation(), {"seed": -1}, "whole number"),
        (groot_observation(2), {"seed": 1}, "one seed for each sample"),
        (groot_observation(), {"value": "yes"}, "true or false"),
        (groot_observation(), {"session_ids": ["a", "b"]}, "one for each sample"),
        (groot_observation(), {"session_ids": [1]}, "one for each sample"),
        (groot_observation(), {"reset_memory": True}, "one for each sample"),
        (groot_observation(), {"action_prefix": np.zeros((1, 2, 2), np.float32)}, "Real-time chunking"),
        (groot_observation(), {"rtc_prefix_len": 4}, "Real-time chunking"),
        (groot_observation(), {"contract_fingerprint": "sha256:0"}, "disagree on what the numbers mean"),
        (groot_observation(), {"policy_contract": replace(CONTRACT, chunk_length=8).to_json()}, "chunk_length: 8"),
        (groot_observation(prompt="explode"), None, "policy failed on this request"),
        (groot_observation(prompt="nan"), None, "not finite"),
        (groot_observation(prompt="short"), None, "wrong shape"),
    ],
)
def test_bad_requests_get_one_paragraph(address, told, options, message):
    with GrootClient(address) as client:
        with pytest.raises(ServeError, match=message) as refused:
            client.get_action(told, options)
        assert "Traceback" not in str(refused.value) and "secret path" not in str(refused.value)
        client.get_action(groot_observation())


def test_good_options_are_read(address):
    options = {"session_ids": ["a"], "reset_memory": [True], "rtc_prefix_len": 0, "other": 1, "seed": 4}
    with GrootClient(address) as client:
        client.get_action(groot_observation(), options | {"policy_contract": CONTRACT.to_json()})
        client.get_action(groot_observation(), {"contract_fingerprint": CONTRACT.fingerprint})
        assert client.reset({"session_ids": ["a"]}) == {"cleared_sessions": []}
        with pytest.raises(ServeError, match="options of reset"):
            client.reset({"session_ids": "a"})


def test_messages_of_several_parts_are_answered_and_those_without_a_delimiter_dropped(address):
    ping = encode({"endpoint": "ping"})
    assert "3 parts" in exchange(address, ping, b"second", b"third")["error"]
    assert "200 parts" in exchange(address, *[ping] * 200)["error"]
    assert "0 parts" in exchange(address)["error"]
    with dealer(address) as socket:
        for parts in ([ping], [ping, ping], [b"x"] * 50):
            socket.send_multipart(parts)
        socket.send_multipart([b"hop", b"", ping])  # as a proxy would: the whole address comes back
        assert socket.recv_multipart()[:2] == [b"hop", b""]


def test_large_messages_are_told_the_limit_and_larger_ones_lose_their_connection():
    with running(server(limits=Limits(max_bytes=20_000))) as address:
        assert "too large" in exchange(address, b"\xc4" * 30_000)["error"]
        with GrootClient(address, dialect=Dialect.NPY, timeout_s=0.3) as client:
            with pytest.raises(ServerGone):
                client.get_action({"video": {"top": np.zeros((1, 1, 100, 300, 3), np.uint8)}})
            client.ping(timeout_s=20)
            client.timeout_s = 20
            client.get_action(groot_observation())


def test_what_is_no_zeromq_harms_nobody(address):
    host, port = address.removeprefix("tcp://").split(":")
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" + b"\0" * 8 + b"\x7f" + b"\3" * 100, b"\0" * 1000, b""):
        with sockets.create_connection((host, int(port)), timeout=20) as other:
            other.sendall(said)
            with GrootClient(address) as client:
                client.ping()


# ---- keys ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", [None, "wrong-key", "Long-Enough", ""])
def test_a_wrong_key_opens_nothing(key):
    with running(server(api_key=KEY)) as address:
        with GrootClient(address, api_key=key) as client:
            for ask in (client.ping, client.get_modality_config, client.reset):
                with pytest.raises(ServeError, match="Unauthorized: Invalid API token"):
                    ask()
        for token in (KEY.encode(), 3, [KEY], None, {"a": KEY}):
            said = exchange(address, encode({"endpoint": "kill", "api_token": token}))
            assert said["error"].startswith("Unauthorized: Invalid API token")
        with GrootClient(address, api_key=KEY) as client:
            client.get_action(groot_observation())


def test_kill_needs_a_key_and_ends_the_server(address):
    said = exchange(address, encode({"endpoint": "kill", "api_token": "anything"}))
    assert "key" in said["error"] and exchange(address, encode({"endpoint": "ping"}))["status"] == "ok"
    ended = server(api_key=KEY, port=0, protocols=(OPENPI, GROOT))
    with addresses(ended) as found:
        assert exchange(found[GROOT], encode({"endpoint": "kill", "api_token": KEY})) is None
        until = time.monotonic() + 60
        with pytest.raises(ServeError):  # both protocols have ended
            while time.monotonic() < until:
                PolicyClient(found[OPENPI], api_key=KEY).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "robot.example"])
def test_the_network_needs_a_key(host):
    with pytest.raises(ServeError, match="without an API key"):
        server(host=host)


# ---- beginning and end ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_it_listens_where_it_is_told(host):
    try:
        with running(server(host=host)) as address, GrootClient(address) as client:
            client.ping()
    except ServeError as err:
        assert host == "::1" and "cannot listen" in str(err)  # a machine without IPv6


def test_a_port_in_use_is_told():
    with sockets.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = running(server(groot_port=other.getsockname()[1]))
        with pytest.raises(ServeError, match="cannot listen here"), taken:
            pass


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"state.arm": ("x", "yy")}, "did you mean 'y'"),
        ({"state.arm": ("x",), "state.hand": ("x",)}, "names a number twice"),
        ({"state.y": ("x",)}, "the name of another number"),
        ({"arm": ("x",)}, "of state or of action"),
        ({"video.arm": ("x",)}, "of state or of action"),
    ],
)
def test_wrong_keys_are_told_before_anybody_listens(keys, message):
    with pytest.raises(ServeError, match=message):
        server(groot_keys=keys)


def test_stopping_ends_connections_and_threads_and_leaves_the_last_answer():
    before = set(threading.enumerate())
    with running(server()) as address:
        client = GrootClient(address, timeout_s=0.3)
        client.ping(timeout_s=60)
    with pytest.raises(ServerGone, match="does not answer"):
        client.ping()
    client.close()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("prts")]


def test_run_returns_when_told_to_stop_with_a_request_under_way():
    policy = Held()

    async def live() -> float:
        stop, ports = asyncio.Event(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(server(policy).run(stop, ports.set_result))
        with dealer(f"tcp://127.0.0.1:{await ports}") as socket:
            socket.send_multipart([b"", encode({"data": {"observation": groot_observation()}})])
            await asyncio.to_thread(policy.thinks.wait, 60)
            threading.Timer(0.2, policy.go_on.set).start()  # the engine finishes what it has begun
            stop.set()
            started = time.monotonic()
            await asyncio.wait_for(task, 60)
            return time.monotonic() - started

    assert asyncio.run(live()) < 20
