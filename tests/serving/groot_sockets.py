"""A server of GR00T's protocol for tests, sockets that send it anything, and what its policy should say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import zmq

from prts_core.policy.observation import STATE
from prts_core.robot.groot_arrays import decode
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, ServerConfig
from tests.serving.fake_policy import FakePolicy, groot_observation

KEY = "long-enough"


def server(policy: FakePolicy | None = None, **config: Any) -> PolicyServer:
    return PolicyServer(policy or FakePolicy(), ServerConfig(**{"groot_port": 0, "protocols": (GROOT,)} | config))


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
