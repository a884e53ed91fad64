"""The server over real sockets: good requests, every kind of bad one, many clients, and a clean end."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from prts_core.contract import Dimension
from prts_core.io.errors import CheckpointError, ContractError, ServeError
from prts_core.io.msgpack import Limits, pack, unpack
from prts_core.policy.observation import STATE
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.engine import Limits as EngineLimits
from prts_core.serving.engine import warm_up
from prts_core.serving.server import PolicyServer, ServerConfig
from prts_core.serving.versions import Version
from tests.fixtures.running_server import running
from tests.serving.fake_policy import CONTRACT, FakePolicy, Held, observation

OTHER = replace(
    CONTRACT,
    chunk_length=8,
    contract=replace(CONTRACT.contract, action=(Dimension("x", "m", relative=True), Dimension("y", "m"))),
)


@pytest.fixture(scope="module")
def policy():
    return FakePolicy()


@pytest.fixture(scope="module")
def url(policy):
    with running(PolicyServer(policy, ServerConfig(port=0, about={"model": "toy"}))) as address:
        yield address


# ---- what works ----------------------------------------------------------------------------------------------------
def test_the_handshake_tells_what_the_numbers_mean(url):
    with PolicyClient(url, contract=CONTRACT) as client:
        assert client.contract == CONTRACT
        assert client.metadata["contract_fingerprint"] == CONTRACT.fingerprint
        assert client.metadata["keys"] == ["observation/state", "observation/top", "observation/wrist", "prompt"]
        assert (client.metadata["protocol_version"], client.metadata["model"]) == (1, "toy")


def test_an_answer_has_actions_timing_and_a_seed_that_repeats_it(url, policy):
    with PolicyClient(url) as client:
        first = client.infer(observation())
        assert first["actions"].shape == (4, 2) and first["actions"].dtype == np.float32
        assert first["server_timing"].keys() == {"infer_ms", "queue_ms"} and first["policy_timing"]["infer_ms"] >= 0
        assert "value" not in first
        again = client.infer(observation(), seed=first["seed"], value=True)
        np.testing.assert_array_equal(again["actions"], first["actions"])
        assert again["server_timing"]["prev_total_ms"] > 0
        assert again["value"] == pytest.approx(first["actions"].mean() + 0.6, abs=1e-5)
        assert not np.array_equal(client.infer(observation())["actions"], first["actions"])
    seen = {c.key: np.full((1, 8, 8, 3), 3 + i, np.uint8) for i, c in enumerate(CONTRACT.contract.cameras)}
    seen[STATE] = observation()["observation/state"][None]
    np.testing.assert_array_equal(policy.act(seen, ["open the faucet"], [first["seed"]])[0], first["actions"])
    assert all(name.startswith("prts-policy") for name in policy.threads - {"MainThread"})


@pytest.mark.parametrize(
    "renamed",
    [
        {"observation.state": [0.1, 0.2, 0.3]},
        {"state": np.array([0.1, 0.2, 0.3], np.float64)},
        {"observation/state": np.array([0.1, 0.2, 0.3], np.float32)},
    ],
)
@pytest.mark.parametrize("camera", ["observation.images.{}", "observation/images/{}", "observation/{}", "{}"])
def test_contract_keys_and_openpi_keys_mean_the_same(url, renamed, camera):
    request = {"prompt": "open the faucet", **renamed}
    request |= {camera.format(name): observation()[f"observation/{name}"] for name in ("top", "wrist")}
    with PolicyClient(url) as client:
        np.testing.assert_array_equal(
            client.infer(request, seed=1)["actions"], client.infer(observation(), seed=1)["actions"]
        )


def test_aliases_give_a_camera_another_name():
    config = ServerConfig(port=0, aliases={"observation/image": "observation.images.top"}, always_value=True)
    with running(PolicyServer(FakePolicy(), config)) as url, PolicyClient(url) as client:
        request = observation(observation__top=None, observation__image=np.full((8, 8, 3), 3, np.uint8))
        assert "value" in client.infer(request)
    with pytest.raises(ServeError, match=r"names no camera.*observation\.images\.top"):
        PolicyServer(FakePolicy(), replace(config, aliases={"a": "observation.images.tob"}))


def test_healthz_answers_without_a_key():
    with (
        running(PolicyServer(FakePolicy(), ServerConfig(port=0, api_key="long-enough"))) as url,
        urllib.request.urlopen(url.replace("ws:", "http:") + "/healthz", timeout=60) as reply,
    ):
        assert (reply.status, reply.read()) == (200, b"OK\n")


# ---- what is refused ------------------------------------------------------------------------------------------------
def exchange(url: str, message: str | bytes) -> tuple[str, int]:
    """Send one raw message; the text frame and the close code that come back."""
    with connect(url, compression=None) as connection:
        assert isinstance(connection.recv(60), bytes)
        connection.send(message)
        said = connection.recv(60)
        assert isinstance(said, str), unpack(said)
        with pytest.raises(ConnectionClosedError) as closed:
            connection.recv(60)
        return said, closed.value.rcvd.code


BAD = [
    ("text", "Text frame", "came as text"),
    ("not msgpack", b"\xc1\xc1", "not readable"),
    ("no mapping", pack([1, 2]), "mapping with text keys"),
    (
        "object dtype",
        msgpack.packb({"x": {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [0]}}),
        "not read",
    ),
    ("wrong state width", pack(observation(observation__state=np.zeros(4, np.float32))), "width of the contract"),
    ("state matrix", pack(observation(observation__state=np.zeros((1, 3), np.float32))), "width of the contract"),
    ("text state", pack(observation(observation__state="abc")), "width of the contract"),
    ("ragged state", pack(observation(observation__state=[[1.0], [1.0, 2.0]])), "no list of numbers"),
    ("NaN state", pack(observation(observation__state=np.array([0, np.nan, 0], np.float32))), "y = nan"),
    ("inf state", pack(observation(observation__state=np.array([0, 0, np.inf], np.float64))), "gripper = inf"),
    ("huge state", pack(observation(observation__state=np.array([0, 0, 1e300], np.float64))), "too large for float32"),
    ("no state", pack(observation(observation__state=None)), "needs its state once"),
    ("two states", pack(observation(state=np.zeros(3, np.float32))), "needs its state once"),
    ("missing camera", pack(observation(observation__wrist=None)), "Field: observation/wrist"),
    ("camera twice", pack(observation(top=np.zeros((8, 8, 3), np.uint8))), "stands twice"),
    ("float image", pack(observation(observation__top=np.zeros((8, 8, 3), np.float32))), "uint8"),
    ("image as list", pack(observation(observation__top=[1, 2])), "uint8"),
    ("channels first", pack(observation(observation__top=np.zeros((3, 8, 8), np.uint8))), r"(3, 8, 8)"),
    ("other size", pack(observation(observation__top=np.zeros((16, 16, 3), np.uint8))), "resize_with_pad(image, 8, 8)"),
    ("no prompt", pack(observation(prompt=None)), "needs a sentence"),
    ("empty prompt", pack(observation(prompt="  ")), "needs a sentence"),
    ("long prompt", pack(observation(prompt="x" * 2001)), "2001 characters"),
    ("unknown key", pack(observation(promt="x")), "did you mean 'prompt'"),
    ("negative seed", pack(observation(seed=-1)), "whole number"),
    ("boolean seed", pack(observation(seed=True)), "whole number"),
    ("odd value flag", pack(observation(value="yes")), "true or false"),
    ("fingerprint", pack(observation(contract_fingerprint="sha256:0")), "disagree on what the numbers mean"),
    ("fingerprint type", pack(observation(contract_fingerprint=3)), "disagree on what the numbers mean"),
    ("contract", pack(observation(policy_contract=OTHER.to_json())), "contract.action[0].relative: True in the client"),
    ("malformed contract", pack(observation(policy_contract={"a": 1})), "malformed"),
]


@pytest.mark.parametrize("message, told", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_requests_get_one_paragraph_and_code_1011(url, message, told):
    said, code = exchange(url, message)
    assert told in said and code == 1011
    assert "Traceback" not in said and "\n" not in said and ".py" not in said
    with PolicyClient(url) as client:  # the server lives on
        assert client.infer(observation())["actions"].shape == (4, 2)


def test_an_oversized_message_is_cut_off_by_code_1009():
    limits = Limits(max_bytes=10_000)
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, limits=limits))) as url:
        with connect(url, compression=None) as connection:
            connection.recv(60)
            connection.send(b"\0" * 20_000)
            with pytest.raises(ConnectionClosedError) as closed:
                connection.recv(60)
            assert closed.value.rcvd.code == 1009
        with PolicyClient(url) as client:
            client.infer(observation())


def test_a_client_with_the_right_contract_is_served_and_a_wrong_one_told_every_field(url):
    with PolicyClient(url) as client:
        assert "actions" in client.infer(observation(policy_contract=CONTRACT.to_json()))
        assert "actions" in client.infer(observation(contract_fingerprint=CONTRACT.fingerprint))
    with pytest.raises(ContractError, match=r"contract\.action\[0\]\.relative.*chunk_length"):
        PolicyClient(url, contract=OTHER)


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_wrong_fingerprint_is_refused_at_the_handshake(url, how):
    def dial(fingerprint: str):
        if how == "query":
            return connect(f"{url}/?contract_fingerprint={fingerprint}")
        return connect(url, additional_headers={"X-PRTS-Contract-Fingerprint": fingerprint})

    with dial(CONTRACT.fingerprint) as connection:
        assert unpack(connection.recv(60))["protocol"] == "openpi"
    with pytest.raises(InvalidStatus) as refused:
        dial(OTHER.fingerprint)
    assert refused.value.response.status_code == 409
    assert b"embodiment toy; state x, y, gripper; action x, y" in refused.value.response.body


@pytest.mark.parametrize("key", [None, "wrong-key", "Long-Enough"])
def test_a_wrong_api_key_is_refused(key):
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, api_key="long-enough"))) as url:
        with pytest.raises(ServeError, match=r"HTTP 401: The API key is missing or wrong"):
            PolicyClient(url, api_key=key)
        with PolicyClient(url, api_key="long-enough") as client:
            assert "actions" in client.infer(observation())


def test_a_web_page_cannot_reach_a_local_server(url):
    with pytest.raises(InvalidStatus) as refused:
        connect(url, origin="https://example.org")
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    "values",
    [{"host": "0.0.0.0"}, {"host": "::"}, {"host": "robot.example"}, {"api_key": "short"}, {"max_clients": 0}],
)
def test_unsafe_settings_are_refused(values):
    with pytest.raises(ServeError):
        ServerConfig(**values)
    assert "secret" not in repr(ServerConfig(api_key="secret-enough"))


def test_a_port_in_use_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = running(PolicyServer(FakePolicy(), ServerConfig(port=other.getsockname()[1])))
        with pytest.raises(ServeError, match="cannot listen here"), taken:
            pass


def test_nobody_listening_is_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServeError, match="Nobody listens"):
        PolicyClient(f"ws://127.0.0.1:{port}", wait_s=0.3)


# ---- a policy that misbehaves ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt, told", [("explode", "RuntimeError"), ("nan", "not finite"), ("short", "wrong shape")])
def test_a_failing_policy_tells_no_secrets_and_lives_on(url, prompt, told, caplog):
    with caplog.at_level(logging.ERROR, "prts.serve"):
        said, code = exchange(url, pack(observation(prompt=prompt)))
    assert told in said and code == 1011 and "secret path" not in said and "Traceback" not in said
    if prompt == "explode":
        assert "secret path" in caplog.text  # the operator sees what the client does not
    with PolicyClient(url) as client:
        client.infer(observation())


def test_a_failing_request_does_not_take_its_batch_with_it():
    policy = FakePolicy(delay_s=0.15)
    with running(PolicyServer(policy, ServerConfig(port=0))) as url:
        clients = [PolicyClient(url) for _ in range(4)]
        prompts = ["go", "go", "explode", "go"]

        def ask(pair):
            try:
                return pair[0].infer(observation(prompt=pair[1]))["actions"].shape
            except ServeError as err:
                return str(err)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, zip(clients, prompts, strict=True)))
        assert [a for a in answers if a == (4, 2)] == [(4, 2)] * 3
        assert "policy failed on this request" in answers[2]
        for client in clients:
            client.close()


def test_a_slow_policy_runs_into_the_timeout():
    policy = Held()
    with running(PolicyServer(policy, ServerConfig(port=0, request_timeout_s=0.1))) as url, PolicyClient(url) as client:
        with pytest.raises(ServeError, match="did not answer in time"):
            client.infer(observation())
        policy.go_on.set()


def test_a_policy_that_breaks_its_contract_is_found_before_the_first_client():
    class Short(FakePolicy):
        def act(self, observation, instruction, seeds):
            return super().act(observation, instruction, seeds)[:, :3]

    assert warm_up(Version("1", own := FakePolicy()), (own,), EngineLimits()) >= 0
    with pytest.raises(CheckpointError, match="does not do what its contract says"):
        warm_up(Version("1", short := Short()), (short,), EngineLimits())


# ---- many at once --------------------------------------------------------------------------------------------------
def test_concurrent_clients_are_batched_and_get_their_own_answers():
    policy = FakePolicy(delay_s=0.05)
    with running(PolicyServer(policy, ServerConfig(port=0, max_clients=12, max_batch=4))) as url:

        def robot(number: int) -> bool:
            with PolicyClient(url) as client:
                for turn in range(4):
                    state = np.array([number, turn, 0], np.float32)
                    actions = client.infer(observation(observation__state=state), seed=number)["actions"]
                    noise = np.random.default_rng(number).normal(size=(4, 2))
                    np.testing.assert_allclose(actions, number + turn + 7 + 3 + noise, rtol=1e-5)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(robot, range(8)))
    assert sum(policy.batches) == 32 and max(policy.batches) == 4 and len(policy.batches) < 32


def test_the_event_loop_answers_while_the_policy_thinks():
    policy = Held()
    with running(PolicyServer(policy, ServerConfig(port=0))) as url, PolicyClient(url) as client:
        asking = threading.Thread(target=client.infer, args=(observation(),))
        asking.start()
        try:
            assert policy.thinks.wait(60)
            urllib.request.urlopen(url.replace("ws:", "http:") + "/healthz", timeout=20).close()
            assert asking.is_alive()
        finally:
            policy.go_on.set()
        asking.join()


def when_there_is_room(url: str) -> PolicyClient:
    """A client of a server that was full: places are free again once it has seen their clients leave."""
    until = time.monotonic() + 60
    while True:
        try:
            return PolicyClient(url)
        except ServeError as err:
            assert "HTTP 503" in str(err) and time.monotonic() < until, err
            time.sleep(0.05)


def test_one_client_too_many_is_told():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, max_clients=2))) as url:
        with PolicyClient(url), PolicyClient(url), pytest.raises(ServeError, match=r"HTTP 503.*at most 2"):
            PolicyClient(url)
        with when_there_is_room(url), when_there_is_room(url):
            pass


def test_a_client_that_disappears_leaves_the_server_well():
    policy = Held()
    with running(PolicyServer(policy, ServerConfig(port=0, max_clients=1))) as url:
        connection = connect(url)
        connection.recv(60)
        connection.send(pack(observation()))
        assert policy.thinks.wait(60)
        connection.socket.shutdown(socket.SHUT_RDWR)
        policy.go_on.set()
        with when_there_is_room(url) as client:
            assert np.isfinite(client.infer(observation())["actions"]).all()


def test_stopping_ends_open_connections_and_the_thread():
    before = set(threading.enumerate())
    server = PolicyServer(FakePolicy(), ServerConfig(port=0))
    with running(server) as url:
        client = PolicyClient(url)
        client.infer(observation())
    with pytest.raises(ServeError, match="closed the connection"):
        client.infer(observation())
    client.close()
    assert server.clients == 0 and not [t for t in set(threading.enumerate()) - before if t.name.startswith("prts")]


def test_run_returns_when_told_to_stop():
    async def live() -> int:
        stop, ports = asyncio.Event(), []
        server = PolicyServer(FakePolicy(), ServerConfig(port=0))
        task = asyncio.create_task(server.run(stop, ports.append))
        while not ports:
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.wait_for(task, 60)
        return ports[0]

    assert asyncio.run(live()) > 0
