"""What goes over a worker's socket: every message comes back as it was, and nothing else comes through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import SimulatorError
from prts_core.io.msgpack import Limits
from prts_core.sim import protocol
from prts_core.sim.protocol import REPLIES, REQUESTS, Array, FrameDecoder, check
from prts_core.sim.suite import EpisodeKey

KEY = EpisodeKey("toy", "push", 1, 7)
MESSAGES = [
    protocol.handshake(),
    protocol.build({"tasks": 3, "names": ["a"]}),
    protocol.reset(KEY, perturbation={"shift": 0.5}),
    protocol.step(np.ones((2, 3))),
    protocol.observe(),
    protocol.state(),
    protocol.demonstrate(KEY, noise=1),
]


def example(wanted: object) -> object:
    """A value of a field's type."""
    if isinstance(wanted, tuple):
        return example(wanted[0])
    if isinstance(wanted, Array):
        return np.zeros((1,) * wanted.ndim, {"u": np.uint8, "b": bool, "f": np.float32}[wanted.kinds])
    return wanted()  # type: ignore[operator]


def test_every_request_has_its_function():
    assert [message["kind"] for message in MESSAGES] == list(REQUESTS)
    assert set(REPLIES) == {*REQUESTS, "refused"}


@pytest.mark.parametrize("piece", [1, 3, 10_000])
def test_messages_arrive_whole_however_they_are_cut(piece: int):
    replies = [
        {"kind": kind} | {name: example(one) for name, one in fields.items()} for kind, fields in REPLIES.items()
    ]
    for table, messages in ((REQUESTS, MESSAGES), (REPLIES, replies)):
        data = b"".join(map(protocol.frame, messages))
        frames, found = FrameDecoder(protocol.REPLY_LIMITS), []
        for start in range(0, len(data), piece):
            found += frames.feed(data[start : start + piece])
        assert [check(message, table)["kind"] for message in found] == [message["kind"] for message in messages]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["kind"])
def test_fields_are_exactly_those_of_the_kind(message: dict):
    with pytest.raises(SimulatorError, match="wrong fields"):
        check({**message, "more": 1}, REQUESTS)
    for name in message.keys() - {"kind"}:
        with pytest.raises(SimulatorError, match="wrong fields"):
            check({key: value for key, value in message.items() if key != name}, REQUESTS)
        with pytest.raises(SimulatorError, match=f"{message['kind']}.{name}"):
            check({**message, name: object()}, REQUESTS)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_is_refused_or_waited_for(data: bytes):
    try:
        for message in FrameDecoder(Limits(max_bytes=1000)).feed(data):
            check(message, REPLIES)
    except SimulatorError:
        return


def test_a_length_beyond_the_limit_is_refused_before_it_is_read():
    with pytest.raises(SimulatorError, match="a frame of 1001 bytes"):
        FrameDecoder(Limits(max_bytes=1000)).feed(protocol.LENGTH.pack(1001))
