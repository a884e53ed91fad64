"""What openpi's server was sent, sent to ours: the same numbers, or one paragraph and code 1011."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from prts_core.contract import Contract, Dimension, PolicyContract
from prts_core.io.errors import ServeError
from prts_core.io.msgpack import pack, unpack
from prts_core.policy.observation import STATE, TwoSteps
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import ServerConfig
from tests.fixtures.running_server import running
from tests.serving.golden_wire import transcript

NAMES = [f"n{i}" for i in range(8)]
CONTRACT = PolicyContract(
    "toy",
    Contract("toy", 20.0, tuple(map(Dimension, NAMES)), tuple(map(Dimension, NAMES[:7])), cameras=()),
    2,
    "QUANTILE",
    "sha256:00",
)
# What the reference lets pass and we refuse: keys that nobody reads, and arrays whose bytes are not their shape's.
STRICTER = ("ok_extra_keys", "nd_")


class Dummy(TwoSteps):
    """The policy of the transcript: 0 .. 13 as (2, 7), plus the first number of the state."""

    contract = CONTRACT

    def act(self, observation, instruction, seeds) -> np.ndarray:
        return np.arange(14, dtype=np.float32).reshape(1, 2, 7) + observation[STATE][:, :1, None].astype(np.float32)

    def value(self, observation, actions, instruction) -> np.ndarray:
        return actions[:, 0, 0]


def with_prompt(frame: bytes) -> bytes:
    """The dummy policy of the transcript took no sentence; ours wants one."""
    try:
        request = unpack(frame)
    except ServeError:
        return frame
    return pack(request | {"prompt": "go"}) if isinstance(request, dict) else frame


def answer(url: str, frame: str | bytes) -> tuple[str | bytes, int | None]:
    with connect(url, compression=None) as connection:
        connection.recv(60)
        connection.send(frame)
        said = connection.recv(60)
        if isinstance(said, bytes):
            return said, None
        with pytest.raises(ConnectionClosedError) as closed:
            connection.recv(60)
        return said, closed.value.rcvd.code


def test_answers_are_those_of_openpi_or_a_refusal():
    cases: list[dict[str, Any]] = [case for case in transcript("openpi_server") if "sent" in case]
    assert len(cases) > 30
    good = {"observation/state": np.zeros(8, np.float32), "prompt": "go"}
    with running(PolicyServer(Dummy(), ServerConfig(port=0))) as url:
        for case in cases:
            (message,) = case["sent"]
            frame = message["text"] if "text" in message else base64.b64decode(message["binary"])
            theirs = case["received"][0].get("actions")
            said, code = answer(url, with_prompt(frame) if theirs is not None else frame)
            if isinstance(said, str):
                assert theirs is None or case["name"].startswith(STRICTER), (case["name"], said)
                assert code == 1011 and "Traceback" not in said, case["name"]
            else:
                assert theirs is not None, case["name"]
                reply = unpack(said)
                np.testing.assert_allclose(reply["actions"], np.array(theirs), rtol=1e-6)
                assert "infer_ms" in reply["server_timing"]
            with PolicyClient(url) as client:
                assert client.infer(good)["actions"].shape == (2, 7)


def test_pipelined_requests_are_answered_in_order():
    (told,) = [case for case in transcript("openpi_server") if case["name"] == "pipelined_three"]
    with running(PolicyServer(Dummy(), ServerConfig(port=0))) as url, connect(url, compression=None) as connection:
        connection.recv(60)
        for first in told["answers_in_order"]:
            connection.send(pack({"observation/state": np.full(8, first, np.float32), "prompt": "go"}))
        found = [float(unpack(connection.recv(60))["actions"][0, 0]) for _ in told["answers_in_order"]]
    assert found == told["answers_in_order"]
