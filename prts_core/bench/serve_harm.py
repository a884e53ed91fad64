"""Measure what clients that do harm cost: broken frames, and connections that break off. Rows of `prts bench serve`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import zmq
from rich.console import Console
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from prts_core.bench.report import Row
from prts_core.bench.serve_parts import Served, Size, ask_for, request, served, threads_of, timed
from prts_core.bench.serve_process import CONTRACT, STAND_IN_S
from prts_core.io.errors import PrtsError
from prts_core.io.msgpack import LIMITS, pack, unpack
from prts_core.robot.groot import GrootClient
from prts_core.robot.groot_arrays import Dialect, decode, encode
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.observations import parse_request
from prts_core.serving.protocols.groot_modality import Modality

PACE_S = 0.005  # between two malformed frames: they are to do harm by what they are, not by their number


def malformed(console: Console, size: Size) -> list[Row]:
    """Broken frames and connections that break off, beside one client that behaves: its p99, the server's memory."""
    rows = []
    for protocol, harm in (("openpi", _harm_openpi), ("groot", _harm_groot)):
        with served() as server:
            before = _well_behaved(server, lambda: time.sleep(min(10.0, size.calls * 2 * STAND_IN_S)))
            memory = server.memory_mb
            during = _well_behaved(server, partial(harm, server, size))
            rest = ask_for(server, 1, 3)
            after = server.memory_mb
            assert len(rest[0]) == 3
        p99 = [float(np.quantile(times, 0.99)) * 1e3 for times in (during, before)]
        note = f"{size.malformed} malformed frames and {size.cut} connections broken off; {len(during)} good requests"
        console.print(f"{protocol}: memory {memory:.0f} -> {after:.0f} MB, p99 {p99[1]:.1f} -> {p99[0]:.1f} ms")
        rows += [
            Row(f"{protocol}: memory after / before malformed frames", after, memory, "MB", "lower", "<= 1.05", note),
            Row(f"{protocol}: a good client's p99 meanwhile / before", p99[0], p99[1], "ms", "lower", "<= 1.2", note),
        ]
    return rows


def _well_behaved(server: Served, meanwhile: Callable[[], object]) -> np.ndarray:
    """Seconds of the requests of one client until `meanwhile` is over."""
    over = threading.Event()
    times: list[float] = []

    def ask() -> None:
        with PolicyClient(server.openpi) as client:
            assert client.contract is not None
            asked = request(client.contract)
            while not over.is_set() or len(times) < 10:
                times.append(timed(lambda: client.infer(asked)))

    def end() -> None:
        try:
            meanwhile()
        finally:
            over.set()

    threads_of([ask, end])
    return np.array(times[3:])


def broken(frame: bytes, draw: random.Random) -> bytes:
    """A frame with bytes changed, removed, repeated or put in."""
    data = bytearray(frame)
    for _ in range(draw.randint(1, 4)):
        at, count = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 64))
        kind = draw.randrange(5)
        if kind == 0:
            data[at : at + count] = draw.randbytes(count)
        elif kind == 1:
            del data[at : at + count]
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = bytes(draw.choice((0xC1, 0xC6, 0xDB, 0xDD, 0xDF, 0xC9)) for _ in range(count))
        else:
            data[:64] = draw.randbytes(64)
    return bytes(data)


def malformed_of(frame: bytes, draw: random.Random, acted: Callable[[bytes], object]) -> bytes:
    """A broken frame that the policy is not asked for: a few changed pixels are a request like any other.

    acted: reads a frame as the server does, and raises PrtsError where it is no request for actions.
    """
    while True:
        found = broken(frame, draw)
        try:
            acted(found)
        except PrtsError:
            return found


def _acted_openpi(frame: bytes) -> None:
    parse_request(unpack(frame, LIMITS), CONTRACT)


def _acted_groot(frame: bytes) -> None:
    asked, _ = decode(frame, LIMITS)
    data = asked.get("data") if isinstance(asked, dict) else None
    Modality.of(CONTRACT).read(data.get("observation") if isinstance(data, dict) else None)


def _harm_openpi(server: Served, size: Size) -> None:
    draw = random.Random(0)
    with PolicyClient(server.openpi) as client:
        assert client.contract is not None
        good = pack(request(client.contract))
    for number in range(size.malformed + size.cut):
        try:
            with connect(server.openpi, compression=None, max_size=None) as connection:
                connection.recv(30)
                if number >= size.malformed:  # in the middle of a frame: length announced, then nothing
                    connection.socket.sendall(b"\x82\xfe\xff\xff" + good[:100])
                    connection.socket.close()
                    continue
                connection.send(malformed_of(good, draw, _acted_openpi))
                connection.recv(30)
        except (WebSocketException, OSError, TimeoutError):
            pass
        time.sleep(PACE_S)


def _harm_groot(server: Served, size: Size) -> None:
    draw, context = random.Random(0), zmq.Context()
    with GrootClient(server.groot) as client:
        keys = client.get_modality_config()
    seen: dict[str, dict[str, Any]] = {
        "video": {key: np.zeros((1, 1, 64, 64, 3), np.uint8) for key in keys["video"].modality_keys}
    }
    seen |= {"state": {key: np.zeros((1, 1, 1), np.float32) for key in keys["state"].modality_keys}}
    seen |= {"language": {key: [["go on"]] for key in keys["language"].modality_keys}}
    good = [encode({"endpoint": "get_action", "data": {"observation": seen}}, dialect) for dialect in Dialect]

    def opened() -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(server.groot)
        return socket

    socket = opened()
    for number in range(size.malformed + size.cut):
        socket.send_multipart([b"", malformed_of(draw.choice(good), draw, _acted_groot)])
        if number < size.malformed:
            socket.poll(30_000)
            socket.recv_multipart()
        else:
            socket.close()
            socket = opened()
        time.sleep(PACE_S)
    socket.close()
    context.term()
