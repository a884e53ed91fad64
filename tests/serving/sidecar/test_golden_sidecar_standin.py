"""The stand-in speaks as RLDX-1's server does: its bytes are those that the reference sent."""

from __future__ import annotations

import base64
import json

import msgpack
import pytest
import zmq

from prts_core.serving.sidecar.child import open_server
from tests.serving.golden_wire import wire_folder
from tests.serving.sidecar import standin_server


@pytest.fixture
def exchanges() -> dict[str, dict]:
    path = wire_folder() / "transcripts" / "rldx_server.json"
    if not path.is_file():
        pytest.skip(f"no transcripts at {path}")
    return {entry["name"]: entry for entry in json.loads(path.read_text())}


def test_golden_ping_and_arrays_of_the_stand_in(exchanges, launch):
    running = open_server(launch)
    try:
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.RCVTIMEO, 60_000)
            socket.connect(launch.address)
            for name in ("ping", "ping_unneeded_token"):
                socket.send(base64.b64decode(exchanges[name]["sent"]))
                assert socket.recv() == base64.b64decode(exchanges[name]["reply"]["frame"]), name
    finally:
        running.close()
    for frame in (exchanges["get_action"]["sent"], exchanges["get_action"]["reply"]["frame"]):
        data = base64.b64decode(frame)
        told = msgpack.unpackb(data, object_hook=standin_server.hook)
        assert msgpack.packb(told, default=standin_server.default) == data
