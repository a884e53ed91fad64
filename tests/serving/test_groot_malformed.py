"""Two thousand malformed frames beside a client that behaves: all are answered, and that client never waits."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
import zmq

from prts_core.io.errors import ServeError
from prts_core.robot.groot import GrootClient
from prts_core.robot.groot_arrays import Dialect, decode, encode
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, ServerConfig
from tests.fixtures.running_server import running
from tests.serving.fake_policy import FakePolicy, groot_observation

FRAMES, BESIDE = 2_000, 8  # malformed ones, and sockets that send them
DTYPES = (b"|O", b"|O8", b"O", b"|V4", b"<M8", b"<U9", b"T", b"<f2", b">f4", b"<c8", b"|S0", b"f4,f4", b"\xff\xff")


def good_frames() -> list[bytes]:
    requests = [
        {"endpoint": "get_action", "data": {"observation": groot_observation(flat=flat), "options": options}}
        for flat in (False, True)
        for options in (None, {"seed": 1, "session_ids": ["a"], "reset_memory": [False]})
    ]
    requests += [{"endpoint": name} for name in ("ping", "get_modality_config", "reset", "kill", "get_policy_contract")]
    return [encode(request, dialect) for request in requests for dialect in Dialect]


def mutated(frame: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A frame with one to four things wrong with it."""
    data = bytearray(frame)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 64))
        match draw.randrange(8):
            case 0:  # single bits, mostly of what is no pixel
                at = draw.randrange(len(data)) if data else 0
                data[at : at + 1] = bytes([data[at] ^ (1 << draw.randrange(8))]) if data else b"\xc1"
            case 1:
                del data[at:]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = draw.randbytes(length)
            case 4:  # lengths, types and markers of MessagePack
                data[at : at + 1] = bytes(
                    [draw.choice((0xC1, 0xC4, 0xC6, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xC7, 0x8F))]
                )
            case 5:
                data = bytearray(bytes(data).replace(b"<f4", draw.choice(DTYPES)).replace(b"|u1", draw.choice(DTYPES)))
            case 6:
                other = draw.choice(others)
                start = draw.randrange(len(other))
                data[at:] = other[start:]
            case 7:
                data[at : at + length] = data[at : at + length] * draw.choice((2, 50))
    return bytes(data[:200_000])


def forged(draw: random.Random) -> bytes:
    """A well-formed message that means nothing."""

    def value(depth: int) -> object:
        kind = draw.randrange(9 if depth else 6)
        if kind == 6:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        if kind >= 7:
            keys = ["endpoint", "data", "observation", "options", "video", "state", "language", "nd", "as_npy", "error"]
            keys += ["__ndarray_class__", "__ModalityConfig__", "__ModalityConfig_class__", "as_json", "task", "x", ""]
            binary = [b"nd", b"type", b"kind", b"shape", b"data", b"complex", b"__ndarray__", b"\xff"]
            return {draw.choice([*keys, *binary]): value(depth - 1) for _ in range(draw.randrange(6))}
        plain = (None, True, draw.randrange(-(2**63), 2**64), draw.uniform(-1e9, 1e9), draw.randbytes(8))
        return plain[kind] if kind < 5 else draw.choice(["ping", "get_action", "kill", "<f4", "|O", "\0", "x" * 300])

    return msgpack.packb(value(draw.randrange(7)))


def attacks(count: int) -> Iterator[list[bytes]]:
    """Messages, as the parts behind the address: a delimiter and one mutated frame, or something else altogether."""
    draw, good = random.Random(20260), good_frames()
    for number in range(count):
        frame = forged(draw) if number % 4 == 0 else mutated(draw.choice(good), draw, good)
        match number % 50:
            case 17:
                yield [b"", frame, *[draw.randbytes(5) for _ in range(draw.randrange(1, 30))]]
            case 18:
                yield [b"hop", b"", frame]
            case 19:
                yield [b""]
            case _:
                yield [b"", frame]


@pytest.mark.timeout(600)
def test_malformed_frames_harm_nobody():
    policy = FakePolicy()
    config = ServerConfig(groot_port=0, protocols=(GROOT,), max_clients=BESIDE + 1)
    answers: list[np.ndarray] = []
    done = threading.Event()
    with running(PolicyServer(policy, config)) as address:

        def behave() -> None:
            with GrootClient(address, timeout_s=60) as client:
                while not done.is_set():
                    actions, _ = client.get_action(groot_observation(), {"seed": 1})
                    answers.append(np.concatenate(list(actions.values()), 2))

        robot = threading.Thread(target=behave)
        robot.start()
        with zmq.Context() as context:
            sockets = [context.socket(zmq.DEALER) for _ in range(BESIDE)]
            for socket in sockets:
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.RCVTIMEO, 60_000)
                socket.connect(address)
            refused = 0
            messages = list(attacks(FRAMES))
            for start in range(0, FRAMES, BESIDE):
                batch = messages[start : start + BESIDE]
                for socket, parts in zip(sockets, batch, strict=False):
                    socket.send_multipart(parts)
                for socket, parts in zip(sockets, batch, strict=False):
                    *_, answer = socket.recv_multipart()  # there is one for each of them
                    value = decode(answer)[0]
                    refused += isinstance(value, dict) and "error" in value
                    said = value.get("error", "") if isinstance(value, dict) else ""
                    assert "Its log has the details" not in said, (parts, said)
            for socket in sockets:
                socket.close()
        done.set()
        robot.join(60)
        with GrootClient(address) as client:
            client.ping()
    assert refused > FRAMES * 0.8
    assert len(answers) > 20 and all(np.array_equal(answer, answers[0]) for answer in answers)


def test_unexpected_faults_of_ours_are_answered_too(monkeypatch, caplog):
    from prts_core.serving.protocols import groot

    def broken(*args: object) -> None:
        raise KeyError("a secret")

    server = PolicyServer(FakePolicy(), ServerConfig(groot_port=0, protocols=(GROOT,)))
    with running(server) as address, GrootClient(address) as client:
        monkeypatch.setattr(groot, "decode", broken)
        with pytest.raises(ServeError, match="Its log has the details") as told:
            client.ping()
        assert "a secret" not in str(told.value) and "a secret" in caplog.text
        monkeypatch.undo()
        client.ping()
