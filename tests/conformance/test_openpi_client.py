"""The real openpi-client from PyPI, in its own environment (numpy < 2), against our server in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prts_core.policy.observation import STATE
from tests.conformance.venvs import ensure_venv
from tests.serving.fake_policy import CONTRACT, FakePolicy

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SERVER = """
import asyncio, signal, sys
sys.path.insert(0, {root!r})
from tests.serving.fake_policy import FakePolicy
from prts_core.serving.server import PolicyServer, ServerConfig

async def live():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = PolicyServer(FakePolicy(), ServerConfig(port=0, api_key={key!r}))
    await server.run(stop, lambda port: print(port, flush=True))

asyncio.run(live())
print("stopped")
"""
CLIENT = """
import json, sys
import numpy as np
from openpi_client.image_tools import resize_with_pad
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port, key = int(sys.argv[1]), sys.argv[2] or None
policy = WebsocketClientPolicy("127.0.0.1", port, api_key=key)
metadata = policy.get_server_metadata()
large = np.full((16, 16, 3), 3, np.uint8)
observation = {
    "observation/state": np.array([0.1, 0.2, 0.3], np.float32),
    "observation/top": resize_with_pad(large, 8, 8),
    "observation/wrist": np.full((8, 8, 3), 4, np.uint8),
    "prompt": "open the faucet",
}
first = policy.infer(observation)
seeded = [policy.infer({**observation, "seed": 5, "value": True}) for _ in range(2)]
assert np.array_equal(seeded[0]["actions"], seeded[1]["actions"])
try:
    policy.infer({**observation, "observation/state": np.zeros(7, np.float32)})
    refused = ""
except RuntimeError as err:
    refused = str(err)
print(json.dumps({
    "numpy": np.__version__,
    "keys": metadata["keys"],
    "fingerprint": metadata["contract_fingerprint"],
    "shape": list(first["actions"].shape),
    "dtype": str(first["actions"].dtype),
    "timing": sorted(first["server_timing"]),
    "actions": seeded[0]["actions"].tolist(),
    "value": seeded[0]["value"],
    "prev_total_ms": seeded[0]["server_timing"]["prev_total_ms"],
    "refused": refused,
}))
"""


@pytest.fixture(scope="module")
def openpi_python() -> Path:
    # typing_extensions: openpi-client imports it without asking for it
    return ensure_venv("openpi-client", [["openpi-client==0.1.2", "numpy<2", "typing_extensions"]])


@pytest.mark.parametrize("key", ["", "a-real-key"])
def test_the_real_client_gets_actions(openpi_python, key):
    code = SERVER.format(root=str(ROOT), key=key or None)
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        client = subprocess.run(
            [openpi_python, "-c", CLIENT, port, key], capture_output=True, text=True, timeout=120, env=env
        )
        assert client.returncode == 0, client.stderr
        told = json.loads(client.stdout.splitlines()[-1])
    finally:
        server.terminate()
        out, _ = server.communicate(timeout=120)
    assert server.returncode == 0 and out.endswith("stopped\n")

    assert told["numpy"].startswith("1.")
    assert told["fingerprint"] == CONTRACT.fingerprint
    assert told["keys"] == ["observation/state", "observation/top", "observation/wrist", "prompt"]
    assert (told["shape"], told["dtype"]) == ([4, 2], "float32")
    assert told["timing"] == ["infer_ms", "queue_ms"] and told["prev_total_ms"] > 0
    seen = {f"observation.images.{name}": np.full((1, 8, 8, 3), n, np.uint8) for name, n in (("top", 3), ("wrist", 4))}
    seen[STATE] = np.array([[0.1, 0.2, 0.3]], np.float32)
    expected = FakePolicy().act(seen, ["open the faucet"], [5])
    np.testing.assert_allclose(told["actions"], expected[0], rtol=1e-6)
    assert told["value"] == pytest.approx(FakePolicy().value(seen, expected, ["open the faucet"])[0], rel=1e-5)
    assert "width of the contract" in told["refused"] and "Traceback" not in told["refused"]


FOREIGN = """
import numpy as np
from openpi_client import msgpack_numpy
from websockets.sync.server import serve

def handle(connection):
    packer = msgpack_numpy.Packer()
    connection.send(packer.pack({"config": "pi05_libero"}))
    while True:
        seen = msgpack_numpy.unpackb(connection.recv())
        assert set(seen) == {"observation/state", "observation/top", "observation/wrist", "prompt"}, sorted(seen)
        told = float(seen["observation/top"][0, 0, 0]) + float(seen["observation/state"][1])
        actions = np.full((10, 2), told)  # float64, as numpy makes it
        connection.send(packer.pack({"actions": actions, "server_timing": {"infer_ms": np.float32(1.5)}}))

server = serve(handle, "127.0.0.1", 0, compression=None, max_size=None)
print(server.socket.getsockname()[1], flush=True)
server.serve_forever()
"""


def test_a_server_that_packs_as_openpi_is_benchmarked_by_the_users_word(openpi_python):
    from prts_core.rollout.remote_policy import RemotePolicy

    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    server = subprocess.Popen([openpi_python, "-c", FOREIGN], stdout=subprocess.PIPE, text=True, env=env)
    try:
        policy = RemotePolicy(f"ws://127.0.0.1:{server.stdout.readline().strip()}", contract=CONTRACT.contract)
        seen = {f"observation.images.{name}": np.full((1, 8, 8, 3), 3, np.uint8) for name in ("top", "wrist")}
        seen[STATE] = np.array([[0.0, 0.25, 0.0]], np.float32)
        answer = policy.ask(seen, ["open the faucet"], [1])
        policy.close()
    finally:
        server.terminate()
        server.communicate(timeout=120)
    assert policy.contract.chunk_length == 10 and "unverified" in policy.identity
    assert answer.values is None and (answer.chunks == np.float32(3.25)).all() and answer.chunks.dtype == np.float32
