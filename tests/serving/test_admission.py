"""Limits over real sockets: rate, bytes, silence, halves; each refusal is told and counted."""

from __future__ import annotations

import socket as sockets
import threading
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from prts_core.io.errors import ServeError
from prts_core.io.msgpack import pack
from prts_core.robot.groot import GrootClient
from prts_core.robot.groot_arrays import encode
from prts_core.robot.openpi import PolicyClient, ServerGone
from prts_core.serving.admission import Admission, Guards
from prts_core.serving.protocols import groot
from prts_core.serving.protocols.groot_token import token_of
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import ServerConfig
from prts_core.serving.telemetry import Telemetry
from tests.fixtures.running_server import running
from tests.serving.fake_policy import FakePolicy, Held, groot_observation, observation
from tests.serving.groot_sockets import KEY, exchange, server


def counted(serving: PolicyServer, why: str) -> float:
    line = f'prts_refused_total{{why="{why}"}} '
    return sum(
        float(said.removeprefix(line)) for said in serving.service.metrics().decode().splitlines() if line in said
    )


# ---- rate ----------------------------------------------------------------------------------------------------------
def test_one_client_that_asks_too_often_is_refused_and_the_others_are_not():
    serving = PolicyServer(FakePolicy(), ServerConfig(port=0, guards=Guards(rate=0.01)))
    with running(serving) as url, PolicyClient(url) as eager, PolicyClient(url) as other:
        eager.infer(observation())
        with pytest.raises(ServeError, match=r"asks too often.*0\.01 a second.*--max-rate"):
            eager.infer(observation())
        other.infer(observation())
        assert counted(serving, "rate") == 1


def test_a_rate_is_one_zeromq_clients_own():
    serving = server(guards=Guards(rate=0.01))
    with running(serving) as address, GrootClient(address) as eager, GrootClient(address) as other:
        eager.ping(timeout_s=20)
        with pytest.raises(ServeError, match="asks too often"):
            eager.ping(timeout_s=20)
        other.ping(timeout_s=20)
        assert counted(serving, "rate") == 1


def test_a_rate_allows_a_seconds_worth_at_once():
    door = Admission(Guards(rate=5), Telemetry())
    for _ in range(5):
        with door.message("one", 1):
            pass
    with pytest.raises(ServeError, match="asks too often"), door.message("one", 1):
        pass
    with door.message("two", 1):
        pass


# ---- bytes ---------------------------------------------------------------------------------------------------------
def test_bytes_are_counted_over_all_clients_until_they_are_answered():
    policy = Held()
    serving = PolicyServer(policy, ServerConfig(port=0, guards=Guards(queued_bytes=1000)))
    with (
        running(serving) as url,
        PolicyClient(url) as first,
        PolicyClient(url) as second,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(first.infer, observation())
        assert policy.thinks.wait(60)
        with pytest.raises(ServeError, match=r"Too many bytes wait.*--max-queued-mb"):
            second.infer(observation())
        policy.go_on.set()
        waiting.result(60)
        with PolicyClient(url) as third:  # there is room again
            third.infer(observation())
    assert counted(serving, "bytes") == 1 and serving.service.admission.queued == 0


def test_bytes_of_zeromq_are_counted_before_anything_is_decoded():
    serving = server(guards=Guards(queued_bytes=100))
    with running(serving) as address:
        assert "Too many bytes" in exchange(address, b"\xc1" * 101)["error"]
        with GrootClient(address) as client:
            client.ping(timeout_s=20)
    assert counted(serving, "bytes") == 1


# ---- silence and halves --------------------------------------------------------------------------------------------
def test_a_silent_connection_gives_its_place_back():
    serving = PolicyServer(FakePolicy(), ServerConfig(port=0, max_clients=1, guards=Guards(idle_s=0.2)))
    with running(serving) as url, PolicyClient(url) as silent:
        silent.infer(observation())
        with pytest.raises(ServerGone, match=r"Nothing came for 0\.2 s"):
            silent._receive()
        with PolicyClient(url) as other:
            other.infer(observation())
    assert counted(serving, "idle") >= 1


@pytest.mark.parametrize("whole_frames", [False, True])
def test_half_a_message_loses_its_connection(whole_frames: bool):
    serving = PolicyServer(FakePolicy(), ServerConfig(port=0, guards=Guards(message_s=0.3)))
    with running(serving) as url, connect(url, max_size=None) as robot:
        robot.recv()
        if whole_frames:  # the first fragment of a message, which no other follows

            def fragments():
                yield b"begun"
                with pytest.raises(ConnectionClosed):
                    robot.recv(timeout=60)
                raise ConnectionResetError

            with pytest.raises((ConnectionResetError, ConnectionClosed)):
                robot.send(fragments())
        else:
            robot.socket.sendall(b"\x82\xfe\x04\x00" + b"mask" + b"a few of a thousand bytes")
            with pytest.raises(ConnectionClosed, match="not whole"):
                robot.recv(timeout=60)
    assert counted(serving, "half_sent") == 1


def test_a_slow_client_is_not_half_a_message():
    """Its answers and pongs are whole frames; a message of several fragments is one while they come."""
    serving = PolicyServer(FakePolicy(), ServerConfig(port=0, guards=Guards(message_s=0.2)))
    with running(serving) as url, connect(url, max_size=None) as robot:
        robot.recv()
        wait = threading.Event()
        for _ in range(2):
            robot.ping()
            wait.wait(0.8)
        packed = pack(observation())
        robot.send([packed[:50], packed[50:]])
        assert isinstance(robot.recv(timeout=60), bytes)
    assert counted(serving, "half_sent") == 0


def test_half_a_zeromq_message_loses_its_connection():
    with running(server(guards=Guards(message_s=0.3))) as address:
        host, port = address.removeprefix("tcp://").split(":")
        with sockets.create_connection((host, int(port)), 60) as peer:
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
            kind = b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
            ready = b"\x05READY" + kind
            peer.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
            peer.sendall(b"\x02" + (10**6).to_bytes(8, "big") + b"a few of a million bytes")
            while peer.recv(4096):  # greetings and heartbeats, then the end
                pass
        with GrootClient(address) as client:
            client.ping(timeout_s=20)


# ---- the key comes first -------------------------------------------------------------------------------------------
def test_a_zeromq_message_without_the_key_is_not_decoded(monkeypatch):
    decoded: list[int] = []
    real = groot.decode
    monkeypatch.setattr(groot, "decode", lambda *given: decoded.append(1) or real(*given))
    serving = server(api_key=KEY)
    with running(serving) as address:
        for request in ({"endpoint": "ping"}, {"endpoint": "ping", "api_token": "wrong"}, {"api_token": 3}, [1], 7):
            assert "Unauthorized" in exchange(address, encode(request))["error"]
        assert "Unauthorized" in exchange(address, b"\xc1 no MessagePack")["error"] and not decoded
        with GrootClient(address, api_key=KEY) as client:
            assert client.get_action(groot_observation())
    assert decoded and counted(serving, "key") == 6


def test_a_token_is_found_behind_anything_and_nothing_is_built_of_that():
    picture = np.zeros((4, 4, 3), np.uint8)
    data = {"observation": {"video": {"top": picture}}, "api_token": "an inner one"}
    assert token_of(encode({"endpoint": "get_action", "data": data, "api_token": "küche"})) == "küche".encode()
    assert token_of(encode({"data": data})) == b""
    assert token_of(b"") == token_of(b"\xdf\xff\xff\xff\xff") == token_of(b"\x91" * 5000) == b""
    assert token_of(b"\x82\xa1a" + b"\x91" * 5000 + msgpack.packb("api_token")) == b""
    assert token_of(msgpack.packb({"api_token": b"bytes are no text"})) == b""
    assert token_of(msgpack.packb({"a": {"b": [1] * 5000}, "api_token": "found"}) + b"more") == b"found"
    assert token_of(b"\x82\x91\x01\x01" + msgpack.packb("api_token") + msgpack.packb("a list is no key")) == b""


def test_limits_that_are_none_are_told():
    for given, flag in (({"rate": -1.0}, "--max-rate"), ({"queued_bytes": 0}, "--max-queued-mb")):
        with pytest.raises(ServeError, match=flag):
            Guards(**given)
