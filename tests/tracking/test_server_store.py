"""The same tracking, registry and lineage against a real MLflow server, whose artifacts come over HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from prts_core.files import read_json
from prts_core.packaging.verify import verify_package
from prts_core.serving.resolve import resolve
from prts_core.tracking import registry
from prts_core.tracking.lineage import trace
from prts_core.tracking.store import client
from prts_core.tracking.suite_results import episodes_of, results_of
from tests.tracking.toy_package import make, named, outcomes, register

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
        process.wait(30)


def test_a_server_takes_runs_models_and_gives_them_back(plan, server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outputs, plan = tmp_path / "outputs", named(plan, "remote")
    made = make(plan, outputs, "w1", outcomes(118))
    register(plan, outputs)
    make(plan, outputs, "w2", outcomes(119))  # compared with the champion's episodes, which come from the server
    register(plan, outputs)
    told = read_json(outputs / "runs" / "register" / "remote" / "output" / "registration.json")
    assert told["version"] == "2" and told["verdict"]["n_pairs"] == 120 and told["aliases"][-1] == "champion"
    assert not (outputs / "mlflow.db").exists() and not (outputs / "mlartifacts").exists()

    links = read_json(outputs / "runs" / "register" / "remote" / "provenance.json")["mlflow"]
    assert links["url"].startswith(server + "/#/experiments/") and "fault" not in links
    first = resolve("models:/remote/1", outputs)
    assert first.package_digest == made["package"].content_digest and first.folder.is_relative_to(tmp_path / "cache")
    verify_package(first.folder)
    assert resolve("models:/remote/1", outputs).folder == first.folder  # downloaded once
    champion = registry.version_of_alias(client(outputs), "remote", registry.CHAMPION)
    recorded = results_of(champion)["benchmark"]
    assert episodes_of(outputs, champion, "benchmark", recorded)["success"].sum() == recorded.successes == 119

    shutil.rmtree(outputs / "runs")  # another machine: nothing on disk, everything on the server
    lineage = trace("models:/remote@champion", outputs)
    assert sorted(step.stage for step in lineage.steps.values()) == ["benchmark", "package"] and not lineage.missing
    assert {step.state for step in lineage.steps.values()} == {"replaced"}
    assert len(client(Path(outputs)).search_model_versions("name = 'remote'")) == 2
