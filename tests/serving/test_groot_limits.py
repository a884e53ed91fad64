"""GR00T's protocol over real sockets: slow policies, many clients, large messages, keys, and a clean end."""

from __future__ import annotations

import asyncio
import socket as sockets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from prts_core.io.errors import ServeError
from prts_core.io.msgpack import Limits
from prts_core.robot.groot import GrootClient
from prts_core.robot.groot_arrays import Dialect, decode, encode
from prts_core.robot.openpi import PolicyClient, ServerGone
from prts_core.serving.protocols.groot import PENDING
from prts_core.serving.service import GROOT, OPENPI
from tests.fixtures.running_server import addresses, running
from tests.serving.fake_policy import Held, groot_observation
from tests.serving.groot_sockets import KEY, dealer, exchange, expected, server


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(server()) as found:
        yield found


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
