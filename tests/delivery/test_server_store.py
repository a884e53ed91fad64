"""The same tracking, registry and lineage against a real MLflow server, whose artifacts come over HTTP; and training
on while the way to that server hangs, is cut and comes back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from prts_core.delivery import registry
from prts_core.delivery.lineage import trace
from prts_core.delivery.resolve import resolve
from prts_core.delivery.suite_results import episodes_of, results_of
from prts_core.delivery.verify import verify_package
from prts_core.io.files import read_json
from prts_core.store.stage import StageResult
from prts_core.tracking import outbox, runs
from prts_core.tracking.runs import stage_run
from prts_core.tracking.store import client
from tests.fixtures.toy_package import make, named, outcomes, register
from tests.fixtures.toy_stages import provenance, toy_manifest, toy_work

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{home}/server.db", "--artifacts-destination", str(home / "files")]
    command = [sys.executable, "-m", "mlflow", "server", *address, *stores]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=home)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1800):
            assert process.poll() is None, (home / "log").read_text()
            try:
                urllib.request.urlopen(url + "/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_a_server_takes_runs_models_and_gives_them_back(plan, server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outputs, plan = tmp_path / "outputs", named(plan, "remote")
    made = make(plan, outputs, "w1", outcomes(118))
    register(plan, outputs)
    make(plan, outputs, "w2", outcomes(119))  # compared with the champion's episodes, which come from the server
    register(plan, outputs)
    told = read_json(outputs / "registrations" / "remote.json")
    assert told["version"] == "2" and told["verdict"]["promote"] and told["aliases"][-1] == "champion"
    assert not (outputs / "mlflow.db").exists() and not (outputs / "mlartifacts").exists()

    links = provenance(outputs, made["package"])["mlflow"]
    assert links["url"].startswith(server + "/#/experiments/") and "fault" not in links
    first = resolve("models:/remote/1", outputs)
    assert first.content_digest == made["package"].content_digest and first.folder.is_relative_to(tmp_path / "cache")
    verify_package(first.folder)
    assert resolve("models:/remote/1", outputs).folder == first.folder  # downloaded once
    shutil.rmtree(tmp_path / "cache")  # ten servers on one home begin at once
    old = tmp_path / "cache/prts/models/somebody-1-1"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    script = "import sys; from pathlib import Path; from prts_core.delivery.resolve import resolve\n"
    script += "print(resolve('models:/remote/1', Path(sys.argv[1])).content_digest)"
    several = [
        subprocess.Popen([sys.executable, "-c", script, str(outputs)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = [process.communicate(timeout=300)[0].strip() for process in several]
    assert told == [first.content_digest] * 4 and not old.exists()
    assert not list((tmp_path / "cache/prts/models").glob(".*.partial"))
    champion = registry.version_of_alias(client(outputs), "remote", registry.CHAMPION)
    recorded = results_of(champion)["benchmark"]
    assert episodes_of(outputs, champion, "benchmark", recorded)["success"].sum() == recorded.successes == 119

    shutil.rmtree(outputs / "store")  # another machine: nothing on disk, everything on the server
    lineage = trace("models:/remote@champion", outputs)
    assert sorted(step.stage for step in lineage.steps.values()) == ["benchmark", "package"] and not lineage.missing
    assert {step.state for step in lineage.steps.values()} == {"gone"}
    assert len(client(Path(outputs)).search_model_versions("name = 'remote'")) == 2


class Way:
    """The way to a server, which a test can let hang or cut. url: its beginning."""

    def __init__(self, server: str) -> None:
        host, port = server.removeprefix("http://").split(":")
        self.target, self.passable, self.open = (host, int(port)), threading.Event(), True
        self.passable.set()
        self.connections: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._listen, daemon=True).start()

    def hang(self) -> None:
        """Connections are taken and nothing is answered."""
        self.passable.clear()

    def cut(self) -> None:
        """Connections break and no new ones are taken, as when the server dies."""
        if self.open:
            self.open = False
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
        for connection in self.connections:
            connection.close()

    def mend(self) -> None:
        if not self.open:
            self.open = True
            self.listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._listen, daemon=True).start()
        self.passable.set()

    def end(self) -> None:
        self.passable.set()
        self.cut()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                self.connections += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self.passable.wait()
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


@pytest.fixture
def way(server):
    made = Way(server)
    yield made
    made.end()


@pytest.mark.parametrize("fault", ["hang", "cut"])
def test_a_server_that_is_away_for_a_while_gets_every_point_later(way, tmp_path, monkeypatch, fault):
    """At the beginning, and once more half way."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", way.url)
    for name, seconds in (("OPEN_SECONDS", 3.0), ("SEND_SECONDS", 0.2)):
        monkeypatch.setattr(runs, name, seconds)
    work = toy_work(tmp_path / "outputs", recipe=f"away-{fault}")
    output = work.folder / "output"
    (output / "report.json").write_text("{}")
    slowest = 0.0

    def train(steps: range) -> None:
        nonlocal slowest
        for step in steps:
            begun = time.monotonic()
            tracked.log({"loss": 1.0 / (1 + step), "lr": 0.1}, step)
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.01)

    getattr(way, fault)()
    begun = time.monotonic()
    with stage_run(work) as tracked:
        assert time.monotonic() - begun < 18
        train(range(0, 100))
        assert tracked.run_id == ""
        way.mend()
        for _ in range(1200):  # a call that hangs ends after 20 s, a refused one is made again after 1, 2, 4 ... s
            if tracked.run_id:
                break
            time.sleep(0.1)
        train(range(100, 200))
        getattr(way, fault)()
        train(range(200, 700))
        way.mend()
        train(range(700, 800))
        tracked.finish(toy_manifest("sft", work.key), StageResult({"rate": 0.5}, {}, ("report.json",)), output)
        assert "fault" not in tracked.links(), tracked.links()["fault"]
    assert slowest < 5.0  # a call that hangs takes 20 s
    store = client(work.outputs)
    run = store.get_run(tracked.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["prts.manifest_digest"]
    assert len(store.search_runs([run.info.experiment_id])) == 1  # a create whose answer was lost is not made twice
    for name in ("loss", "lr"):
        assert [point.step for point in store.get_metric_history(tracked.run_id, name)] == list(range(800))
    assert {item.path for item in store.list_artifacts(tracked.run_id)} == {"config.json", "report.json"}


def test_a_server_that_does_not_come_back_ends_in_time_and_is_told(way, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", way.url)
    monkeypatch.setattr(outbox.Outbox.flush, "__defaults__", (4.0,))
    monkeypatch.setattr(runs, "PATIENCE_S", 4.0)
    work = toy_work(tmp_path / "outputs", recipe="gone")
    with stage_run(work) as tracked:
        assert tracked.run_id
        way.hang()
        tracked.log({"loss": 1.0}, 1)
        begun = time.monotonic()
        tracked.finish(toy_manifest("sft", work.key), StageResult({"rate": 0.5}), work.folder / "output")
        fault = tracked.links()["fault"]
    assert time.monotonic() - begun < 18  # the patience of a run that nobody has changed is 20 s
    assert "metrics" in fault and "result tags" in fault and tracked.links()["run_id"] == tracked.run_id
