"""What an operator relies on: keys that can be revoked, true health, metrics, an end without losses, hot swap."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import threading
import time
import urllib.error
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.io.errors import ServeError
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.follow import follow
from prts_core.serving.keys import Keys
from prts_core.serving.protocols.groot_modality import Modality
from prts_core.serving.server import PolicyServer, ServerConfig
from prts_core.serving.service import PolicyService
from prts_core.serving.versions import Version
from tests.fixtures.running_server import running
from tests.serving.fake_policy import CONTRACT, FakePolicy, Held, groot_observation, observation


def line(name: str, key: str) -> str:
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


def get(url: str, path: str, key: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url.replace("ws:", "http:") + path)
    if key is not None:
        request.add_header("Authorization", f"Api-Key {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


# ---- keys ----------------------------------------------------------------------------------------------------------
def test_keys_have_names_and_are_revoked_while_the_server_runs(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# robots\n" + line("arm", "arms-own-key") + line("lab", "labs-own-key"))
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, key_file=file))) as url:
        for key in ("arms-own-key", "labs-own-key"):
            with PolicyClient(url, api_key=key) as client:
                client.infer(observation())
        with pytest.raises(ServeError, match="HTTP 401"):
            PolicyClient(url, api_key="nobodys-key")
        open_one = PolicyClient(url, api_key="labs-own-key")
        file.write_text(line("arm", "arms-own-key"))
        with pytest.raises(ServeError, match="HTTP 401"):
            PolicyClient(url, api_key="labs-own-key")
        with pytest.raises(ServeError, match="not valid any more"):  # and whoever is connected already
            open_one.infer(observation())
        file.write_bytes(b"\xff no key at all\n")  # a slip of the editor locks nobody out, and lets nobody in
        with PolicyClient(url, api_key="arms-own-key") as client:
            client.infer(observation())
        with pytest.raises(ServeError, match="HTTP 401"):
            PolicyClient(url, api_key="labs-own-key")


def test_a_wrong_key_file_is_told_before_anything_is_loaded(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(line("arm", "arms-own-key") + "lab plain-text-key\n")
    with pytest.raises(ServeError, match=r"line 2.*lab plain-text-key.*sha256sum"):
        ServerConfig(host="0.0.0.0", key_file=file)
    file.write_text(line("arm", "a") + line("arm", "b"))
    with pytest.raises(ServeError, match="stands twice"):
        Keys(file=file)
    with pytest.raises(ServeError, match="cannot be read"):
        Keys(file=tmp_path / "none")
    assert Keys(file=None).admits(b"") and not Keys("long-enough").admits(b"")
    file.write_text(line("arm", "arms-own-key"))
    assert Keys("long-enough", file).name_of(b"arms-own-key") == "arm"


# ---- health, metrics -----------------------------------------------------------------------------------------------
def test_health_turns_red_while_the_policy_hangs():
    policy = Held()
    with running(PolicyServer(policy, ServerConfig(port=0, stuck_s=0.2))) as url, PolicyClient(url) as client:
        assert get(url, "/healthz") == (200, "OK\n") and get(url, "/readyz")[0] == 200
        asking = threading.Thread(target=client.infer, args=(observation(),))
        asking.start()
        try:
            assert policy.thinks.wait(60)
            until = time.monotonic() + 30
            while get(url, "/healthz")[0] == 200 and time.monotonic() < until:
                time.sleep(0.05)
            assert get(url, "/healthz")[0] == 503 and "has not answered" in get(url, "/readyz")[1]
        finally:
            policy.go_on.set()
        asking.join()
        assert get(url, "/healthz") == (200, "OK\n")


def test_why_the_server_is_unwell_is_told_with_the_key_alone(monkeypatch: pytest.MonkeyPatch):
    """The reason may quote a sidecar's log and its path; a probe needs the status."""
    why = property(lambda service: "ended by SIGKILL: token=abc. Its log: /home/somebody/rldx.log")
    monkeypatch.setattr(PolicyService, "unwell", why)
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, api_key="long-enough"))) as url:
        for path in ("/healthz", "/readyz"):
            for key in ("", "a-wrong-key"):
                status, told = get(url, path, key)
                assert status == 503 and "token" not in told and "/state.json" in told
            assert "token=abc" in get(url, path, "long-enough")[1]
        assert "token=abc" in get(url, "/state.json", "long-enough")[1]  # the cure of what was withheld
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url:
        assert "token=abc" in get(url, "/healthz")[1]
        rebound = urllib.request.Request(url.replace("ws:", "http:") + "/healthz", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="503") as found:
            urllib.request.urlopen(rebound, timeout=60)
        assert b"token" not in found.value.read()


def test_ready_is_not_said_to_one_client_too_many():
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, max_clients=1))) as url, PolicyClient(url):
        assert get(url, "/readyz")[0] == 503 and get(url, "/healthz")[0] == 200


def test_metrics_count_what_was_done():
    policy = FakePolicy(delay_s=0.02)
    config = ServerConfig(port=0, api_key="long-enough", budget_ms=1.0, about={"model_version": "7"})
    with running(PolicyServer(policy, config)) as url:
        with PolicyClient(url, api_key="long-enough") as client:
            client.infer(observation(), value=True)
            client.infer(observation())
            told = get(url, "/metrics", "long-enough")[1]
        assert get(url, "/metrics")[0] == 401
    for wanted in (
        'prts_requests_total{version="7"} 2.0',
        "prts_budget_violations_total 2.0",
        'prts_seconds_count{phase="policy"} 2.0',
        'prts_value_nats_count{version="7"} 1.0',
        'prts_sessions{version="7"} 1.0',
        'prts_serving{version="7"} 1.0',
    ):
        assert wanted in told, (wanted, told)


def test_a_client_is_told_of_the_version_that_answers_it():
    server = PolicyServer(Version("1", FakePolicy(), "sha256:one"), ServerConfig(port=0))
    with running(server) as url, PolicyClient(url) as old:
        server.service.versions.offer(Version("2", FakePolicy(), "sha256:two"))
        with PolicyClient(url) as new:
            for client, name, digest in ((old, "1", "sha256:one"), (new, "2", "sha256:two")):
                assert (client.metadata["model_version"], client.metadata["package_digest"]) == (name, digest)
                assert client.infer(observation())["version"] == name


def test_a_policy_that_hangs_does_not_keep_the_server_from_ending():
    policy = Held()
    server = PolicyServer(policy, ServerConfig(port=0, drain_s=0.1, request_timeout_s=0.3, stuck_s=0.1))
    late = pytest.raises(ServeError, match="did not answer in time")
    with running(server) as url, PolicyClient(url) as client, late:
        client.infer(observation())
    policy.go_on.set()  # only now: the server has ended before


# ---- the end, and another version ------------------------------------------------------------------------------------
def test_what_is_under_way_is_answered_before_the_server_ends():
    policy = Held()

    async def live() -> np.ndarray:
        stop, ports = asyncio.Event(), []
        server = PolicyServer(policy, ServerConfig(port=0))
        task = asyncio.create_task(server.run(stop, ports.append))
        while not ports:
            await asyncio.sleep(0.01)
        client = await asyncio.to_thread(PolicyClient, f"ws://127.0.0.1:{ports[0]}")
        asking = asyncio.create_task(asyncio.to_thread(client.infer, observation()))
        await asyncio.to_thread(policy.thinks.wait, 60)
        stop.set()
        await asyncio.sleep(0.2)
        assert "about to end" in (server.service.unready or "") and not task.done()
        policy.go_on.set()
        reply = await asking
        await asyncio.wait_for(task, 60)
        return reply["actions"]

    assert np.isfinite(asyncio.run(live())).all()


def test_a_hot_swap_under_load_fails_no_request():
    """The alias moves to a version, to a broken one, and back: sessions finish on theirs, new ones get the new one."""

    class Broken(FakePolicy):
        def act(self, *asked) -> np.ndarray:
            raise RuntimeError("broken weights")

    server = PolicyServer(FakePolicy(), ServerConfig(port=0, max_clients=64, about={"model_version": "1"}))
    named, loaded = ["1"], []

    def load(name: str) -> Version:
        loaded.append(name)
        return Version(name, Broken() if name == "3" else FakePolicy())

    met: set[str] = set()

    def robot(url: str) -> int:
        with PolicyClient(url) as client:
            versions = {client.infer(observation(), seed=1)["version"] for _ in range(12)}
        assert len(versions) == 1
        met.update(versions)
        return 12

    with running(server) as url:
        following = threading.Thread(
            target=lambda: asyncio.run(
                _for_a_while(follow(server.service.engine, server.service.versions, lambda: named[0], load, 0.02), 8.0)
            ),
            daemon=True,
        )
        following.start()
        done = 0
        with ThreadPoolExecutor(4) as pool:
            for name in ("1", "2", "3", "1", "2", "1"):
                named[0] = name
                time.sleep(0.3)
                done += sum(pool.map(robot, [url] * 8))
                assert server.service.versions.current.name == ("2" if name == "3" else name)
        following.join()
    assert done == 6 * 8 * 12 and met == {"1", "2"}
    assert loaded == ["2", "3"]  # the broken one once, and the first one was still here
    assert server.service.versions.current.name == "1"


async def _for_a_while(what, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(what, seconds)


def test_a_version_that_is_refused_is_let_go_of():
    """Its weights and processes would else stay until the alias moves again."""
    service = PolicyService(FakePolicy(), ServerConfig(about={"model_version": "1"}))
    made: list[weakref.ref[Version]] = []

    def load(name: str) -> Version:
        version = Version(
            name, FakePolicy(contract=replace(CONTRACT, chunk_length=3))
        )  # which its policy does not give
        made.append(weakref.ref(version))
        return version

    asyncio.run(_for_a_while(follow(service.engine, service.versions, lambda: "2", load, 0.02), 1.0))
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_a_contract_is_that_of_any_version_that_is_held():
    service = PolicyService(FakePolicy(), ServerConfig(about={"model_version": "1"}))
    other = replace(CONTRACT, statistics_digest="sha256:11")
    service.versions.offer(Version("2", FakePolicy(contract=other)))
    assert service.contract_named(CONTRACT.fingerprint) == CONTRACT  # of sessions that began on it
    assert service.contract_named(other.fingerprint) == service.contract_named("another's") == other
    read = Modality.of(CONTRACT).read
    for own in (CONTRACT, other):
        assert read(groot_observation(), {"contract_fingerprint": own.fingerprint}, service.contract_named)
    with pytest.raises(ServeError, match="disagree"):
        read(groot_observation(), {"contract_fingerprint": "another's"}, service.contract_named)
