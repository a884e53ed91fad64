"""Our client of GR00T's protocol against servers that are slow, silent, old, rude or of one dialect only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from prts_core.io.errors import ServeError
from prts_core.robot.groot import GrootClient
from prts_core.robot.groot_arrays import Dialect, ModalityConfig, decode, encode
from prts_core.robot.openpi import ServerGone

CONFIGS = {"state": ModalityConfig([0], ["x"])}


@contextmanager
def foreign(answer: Callable[[bytes], bytes | None], endpoint: str = "tcp://127.0.0.1:*") -> Iterator[str]:
    """A REP server, as the references': `answer` makes each reply; none leaves the client without one."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(endpoint)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                if socket.poll(20):
                    *address, message = socket.recv_multipart()
                    if (reply := answer(message)) is not None:
                        socket.send_multipart([*address, reply])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield socket.getsockopt_string(zmq.LAST_ENDPOINT)
        finally:
            ended.set()
            thread.join()


def of_one_dialect(dialect: Dialect, seen: list[Any]) -> Callable[[bytes], bytes]:
    """A server that reads and writes one form of arrays, and takes those of the other for plain maps."""

    def answer(message: bytes) -> bytes:
        request, found = decode(message)
        seen.append((request["endpoint"], found))
        if request["endpoint"] == "get_modality_config":
            return encode(CONFIGS, dialect)
        if found is not dialect:
            return encode({"error": "State key 'x' must be a numpy array. Got <class 'dict'>"})
        return encode([{"x": request["data"]["observation"]["state"]["x"] + 1}, {}], dialect)

    return answer


@pytest.mark.parametrize("dialect", Dialect)
def test_the_dialect_is_learned_from_the_server(dialect: Dialect):
    seen: list[Any] = []
    with foreign(of_one_dialect(dialect, seen)) as address, GrootClient(address) as client:
        for _ in range(2):
            actions, info = client.get_action({"state": {"x": np.zeros((1, 1, 1), np.float32)}})
            assert actions["x"] == 1 and actions["x"].flags.writeable and info == {}
    assert [endpoint for endpoint, _ in seen] == ["get_modality_config", "get_action", "get_action"]


def test_a_silent_server_is_told_and_the_next_request_works():
    silent = threading.Event()
    silent.set()

    def answer(message: bytes) -> bytes | None:
        return None if silent.is_set() else encode({"status": "ok", "message": decode(message)[0]["endpoint"]})

    with foreign(answer) as address, GrootClient(address, timeout_s=0.2) as client:
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(ServerGone, match=r"does not answer.*within 0\.2 s.*loads its weights"):
                client.ping()
            assert time.monotonic() - started < 20
        silent.clear()
        client.ping(timeout_s=60)


def test_a_server_that_starts_later_or_again_is_found():
    with zmq.Context() as context, context.socket(zmq.REP) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    address = f"tcp://127.0.0.1:{port}"
    with GrootClient(address, timeout_s=0.2) as client:
        with pytest.raises(ServerGone):
            client.ping()
        for _ in range(2):
            with foreign(lambda message: encode({"status": "ok"}), address):
                client.ping(timeout_s=60)


@pytest.mark.parametrize(
    "reply, told",
    [
        (b"ERROR", "without a word"),
        (encode({"error": "the arm is off"}), "the arm is off"),
        (encode({"error": ""}), "refused"),
        (b"\xc1", "not readable"),
        (encode([1, 2, 3]), "no actions"),
        (encode({"x": 1}), "no actions"),
        (encode([{"x": [1.0]}, {}]), "no actions"),
        (encode(None), "no actions"),
    ],
)
def test_what_a_server_says_instead_of_actions_is_told(reply: bytes, told: str):
    with foreign(lambda message: reply) as address, GrootClient(address, dialect=Dialect.NPY) as client:
        with pytest.raises(ServeError, match=told) as refused:
            client.get_action({"state": {}})
        assert not isinstance(refused.value, ServerGone)


def test_the_key_goes_with_every_request_and_configs_must_be_configs():
    def answer(message: bytes) -> bytes:
        request = decode(message)[0]
        return encode({"error": "no"} if request.get("api_token") != "a-good-key" else {"state": 3})

    with foreign(answer) as address:
        with GrootClient(address, api_key="a-good-key") as client:
            client.ping()
            assert client.reset() == {"state": 3}
            with pytest.raises(ServeError, match="modality config"):
                client.get_modality_config()
        with GrootClient(address) as client, pytest.raises(ServeError, match="no"):
            client.ping()


def test_an_address_that_is_none_is_told():
    with GrootClient("127.0.0.1:5555") as client, pytest.raises(ServeError, match="tcp://host:port"):
        client.ping()
