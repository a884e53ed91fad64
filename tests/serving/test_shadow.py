"""A proxy between a robot and its server, and a second policy that is asked the same: the robot sees no difference."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from prts_core.cli.main import main
from prts_core.io.errors import ContractError, ServeError
from prts_core.io.msgpack import pack
from prts_core.robot.openpi import PolicyClient
from prts_core.rollout.local_policy import LocalPolicy
from prts_core.serving.server import PolicyServer, ServerConfig
from prts_core.serving.shadow import Shadow, live_metadata, proxy, require_comparable
from tests.fixtures.running_server import running
from tests.serving.fake_policy import CONTRACT, FakePolicy, Held, observation

ROOT = Path(__file__).parents[2]


class Other(FakePolicy):
    """Answers half a metre more than the live policy to the same noise."""

    def act(self, *asked: Any) -> np.ndarray:
        return super().act(*asked) + np.float32([0.5, 0.0])


@contextlib.contextmanager
def accompanied(shadow: Shadow, live: str) -> Iterator[str]:
    """The proxy in a thread of its own; yields its address."""
    up, found = threading.Event(), {}

    async def live_on() -> None:
        found["loop"], found["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def ready(port: int) -> None:
            found["port"] = port
            up.set()

        await proxy(shadow, live, found["stop"], ready, port=0)

    thread = threading.Thread(target=lambda: asyncio.run(live_on()), daemon=True)
    with shadow:
        thread.start()
        assert up.wait(60)
        try:
            yield f"ws://127.0.0.1:{found['port']}"
        finally:
            found["loop"].call_soon_threadsafe(found["stop"].set)
            thread.join(60)


def shadow_of(policy: FakePolicy, **options: Any) -> Shadow:
    return Shadow(LocalPolicy(policy, {"policy_digest": "sha256:s"}, values=False), **options)


def compared(shadow: Shadow, count: int) -> None:
    reached(lambda: shadow.errors.looks + shadow.failed + shadow.dropped >= count)


def reached(done: Callable[[], bool]) -> None:
    for _ in range(6000):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("it has not come to it")


def test_the_robot_gets_what_its_server_says_and_the_shadow_is_compared_with_it():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, about={"model": "live"}))) as live:
        shadow = shadow_of(Other())
        with accompanied(shadow, live) as url:
            with PolicyClient(url, contract=CONTRACT) as robot, PolicyClient(live) as straight:
                assert robot.metadata == straight.metadata
                for seed in range(3):
                    told, known = (client.infer(observation(), seed=seed) for client in (robot, straight))
                    np.testing.assert_array_equal(told["actions"], known["actions"])
                robot.infer(observation(policy_contract=CONTRACT.to_json()))
            compared(shadow, 4)
        report = shadow.report()
    assert (report["asked"], report["looks"], report["dropped"], report["failed"]) == (4, 4, 0, 0), report["why"]
    x, y = report["dimensions"]
    assert x["mean"] == pytest.approx(0.5, abs=1e-5) and y["mean"] == pytest.approx(0, abs=1e-5)
    assert len(report["rows"]) == 4


def test_every_byte_passes_unchanged_both_ways():
    """By a server that knows no policy: metadata, answers, texts and close codes are carried as they are."""
    seen: list[bytes | str] = []
    metadata, reply = pack({"anything": [1, 2]}), pack({"strange": b"\\x00\\xff"})

    def serve_one(connection: Any) -> None:
        connection.send(metadata)
        seen.append(connection.recv())
        connection.send(reply)
        seen.append(connection.recv())
        assert connection.recv() == bytes(3 * 2**20)
        connection.send("refused, in words")
        connection.close(1011, "as it was")

    from websockets.sync.server import serve

    with serve(serve_one, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        shadow = shadow_of(FakePolicy())
        with accompanied(shadow, f"ws://127.0.0.1:{server.socket.getsockname()[1]}") as url:
            with connect(url, compression=None) as robot:
                assert robot.recv(60) == metadata
                robot.send(b"\x81\xa1a\x01")
                assert robot.recv(60) == reply
                robot.send("a text")  # and a picture of 3 MB behind it
                robot.send(bytes(3 * 2**20))
                assert robot.recv(60) == "refused, in words"
                with pytest.raises(ConnectionClosed) as closed:
                    robot.recv(60)
                assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, "as it was")
            compared(shadow, 1)
        server.shutdown()
        thread.join(60)
    assert seen == [b"\x81\xa1a\x01", "a text"]
    assert shadow.failed == 1 and "unknown key" in shadow.why, "what the shadow cannot read is counted, and no more"


def test_a_shadow_that_hangs_slows_nobody_and_what_it_misses_is_counted():
    thinking = Held()
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as live:
        shadow = shadow_of(thinking, queued=2)
        with accompanied(shadow, live) as url:
            with PolicyClient(url) as robot:
                robot.infer(observation())
                assert thinking.thinks.wait(60)
                for _ in range(5):
                    robot.infer(observation())
            reached(lambda: shadow.asked == 6)
            assert (shadow.dropped, shadow.errors.looks) == (3, 0), "one under way, two that wait"
            thinking.go_on.set()
            compared(shadow, 6)
    assert shadow.errors.looks == 3


def test_a_shadow_that_fails_reaches_no_robot():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as live:
        shadow = shadow_of(Other())
        shadow.policy.policy.act = lambda *asked: 1 / 0  # type: ignore[attr-defined]
        with accompanied(shadow, live) as url:
            with PolicyClient(url) as robot:
                for _ in range(3):
                    assert robot.infer(observation())["actions"].shape == (4, 2)
            compared(shadow, 3)
    assert shadow.failed == 3 and "ZeroDivisionError" in shadow.why


def test_refusals_and_health_are_those_of_the_live_server():
    config = ServerConfig(port=0, api_key="a-long-enough-key")
    with running(PolicyServer(FakePolicy(), config)) as live, accompanied(shadow_of(FakePolicy()), live) as url:
        with pytest.raises(ServeError, match=r"HTTP 401.*API key is missing or wrong"):
            PolicyClient(url)
        with PolicyClient(url, api_key="a-long-enough-key") as robot:
            assert robot.infer(observation())["actions"].shape == (4, 2)
            with pytest.raises(ServeError, match="A camera is missing"):
                robot.infer(observation(observation__top=None))
        with pytest.raises(InvalidStatus) as refused:
            connect(url, origin="http://somewhere")
        assert refused.value.response.status_code == 403
        health = url.replace("ws:", "http:")
        with urllib.request.urlopen(health + "/healthz", timeout=60) as reply:
            assert reply.status == 200 and reply.read() == b"OK\n"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(health + "/metrics", timeout=60)


def test_what_is_no_robot_takes_none_of_the_live_servers_places():
    """A browser's GET, and a handshake that fails after the live server has been asked."""
    serving = PolicyServer(FakePolicy(), ServerConfig(port=0, max_clients=2))
    with running(serving) as live, accompanied(shadow_of(FakePolicy()), live) as url:
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError, match="426"):
                urllib.request.urlopen(url.replace("ws:", "http:") + "/favicon.ico", timeout=60)
            half = urllib.request.Request(url.replace("ws:", "http:"), headers={"Upgrade": "websocket"})
            with pytest.raises(urllib.error.HTTPError, match="426"):
                urllib.request.urlopen(half, timeout=60)
            reached(lambda: serving.clients == 0)
        with PolicyClient(url) as robot:
            assert robot.infer(observation())["actions"].shape == (4, 2)


def test_a_live_server_that_is_gone_is_told():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as live:
        pass
    with accompanied(shadow_of(FakePolicy()), live) as url:
        with pytest.raises(ServeError, match=r"HTTP 502.*live server .* is not reached"):
            PolicyClient(url)
        with pytest.raises(urllib.error.HTTPError, match="502"):
            urllib.request.urlopen(url.replace("ws:", "http:") + "/healthz", timeout=60)


def test_chunks_of_other_lengths_and_committed_rows_are_compared_where_both_speak():
    longer = FakePolicy(contract=replace(CONTRACT, chunk_length=4))
    shadow = shadow_of(longer)
    request = pack(observation())
    live = {"actions": np.zeros((6, 2), np.float32), "seed": 1, "held": 1}
    shadow._compare(request, pack(live))
    assert shadow.errors.count.tolist() == [0, 1, 1, 1], "row 0 is one of the chunk before"
    shadow._compare(request, pack(live | {"actions": np.zeros((2, 2), np.float32), "held": 0}))
    assert shadow.errors.count.tolist() == [1, 2, 1, 1]
    with pytest.raises(ServeError, match="no actions of these dimensions"):
        shadow._compare(request, pack(live | {"actions": np.zeros((2, 3), np.float32)}))


def test_a_server_without_a_key_is_not_passed_on_to_the_network():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, about={"model": "m"}))) as live:
        with pytest.raises(ServeError, match=r"asks for no API key.*Found: 0\.0\.0\.0.*Cure: serve the live policy"):
            live_metadata(live, None, "0.0.0.0")
        assert live_metadata(live, None, "127.0.0.1")["model"] == "m"
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, api_key="a-long-enough-key"))) as live:
        assert "policy_contract" in live_metadata(live, "a-long-enough-key", "0.0.0.0")


def test_policies_of_other_numbers_are_refused():
    told = {"policy_contract": CONTRACT.to_json()}
    require_comparable(told, replace(CONTRACT, chunk_length=8), "ws://a")
    with pytest.raises(ContractError, match=r"control_hz: 20\.0 in the live policy, 5\.0 in the shadow"):
        require_comparable(told, replace(CONTRACT, contract=replace(CONTRACT.contract, control_hz=5.0)), "ws://a")
    with pytest.raises(ServeError, match="does not say what its numbers mean"):
        require_comparable({}, CONTRACT, "ws://a")
    with pytest.raises(ServeError, match="malformed"):
        require_comparable({"policy_contract": {"a": 1}}, CONTRACT, "ws://a")


def test_the_command_accompanies_until_it_is_told_to_stop(tmp_path: Path):
    with (
        running(PolicyServer(FakePolicy(), ServerConfig(port=0, about={"model": "live"}))) as live,
        running(PolicyServer(Other(), ServerConfig(port=0, about={"package_digest": "sha256:other"}))) as other,
    ):
        command = [sys.executable, "-m", "prts_core.cli.main", "replay", "--shadow", live, "--policy", other]
        process = subprocess.Popen(
            [*command, "--port", "0", "--json", "--outputs", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        url = next(line for line in process.stderr if "connect the robot" in line).split()[-1]
        with PolicyClient(url) as robot:
            for _ in range(2):
                robot.infer(observation())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        report = json.loads(out)
        assert report["asked"] in (1, 2) and report["live"]["model"] == "live"
        assert report["shadow"]["package_digest"] == "sha256:other"
        assert json.loads((tmp_path / "replay" / "shadow" / "report.json").read_text()) == report
        assert (tmp_path / "replay" / "shadow" / "page.html").is_file()
        wrong = replace(CONTRACT, contract=replace(CONTRACT.contract, control_hz=5.0))
        with running(PolicyServer(FakePolicy(contract=wrong), ServerConfig(port=0))) as third:
            assert main(["replay", "--shadow", live, "--policy", third, "--outputs", str(tmp_path)]) == 1
