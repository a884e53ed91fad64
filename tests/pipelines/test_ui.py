"""`make ui`: ports that are taken are told with a cure, and an answer of somebody else's server is none."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from pipelines import ui
from prts_core.io.errors import ConfigError, StageError


@pytest.fixture
def stranger():
    """A web server of somebody else."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def test_a_port_that_is_taken_is_told_with_a_port_that_is_free(project, stranger, monkeypatch, capsys):
    monkeypatch.setenv("PRTS_DAGSTER_PORT", str(stranger))
    monkeypatch.setenv("PRTS_MLFLOW_PORT", str(ui.free_port()))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process are the tests'
    assert ui.main() == 1
    said = capsys.readouterr().err
    assert "Another program has the port of Dagster's page" in said and f"{stranger}" in said
    cure = said.split("`")[-2]
    variable, port = cure.split()[0].split("=")
    assert variable == "PRTS_DAGSTER_PORT" and cure.endswith("make ui")
    ui.require_free("Dagster", int(port))


def test_the_answer_of_a_stranger_does_not_count(stranger):
    assert ui.answers(f"http://127.0.0.1:{stranger}")
    assert ui.listens(stranger, os.getsid(0))
    assert not ui.listens(stranger, 1)


def test_a_port_is_a_number(monkeypatch):
    monkeypatch.setenv("PRTS_MLFLOW_PORT", "five")
    with pytest.raises(ConfigError, match="This is no port"):
        ui.chosen_port("MLflow")


def test_a_server_that_dies_is_an_error_with_its_last_words(project, monkeypatch):
    monkeypatch.setenv("PRTS_DAGSTER_PORT", str(ui.free_port()))
    monkeypatch.setenv("PRTS_MLFLOW_PORT", str(ui.free_port()))
    monkeypatch.setattr(ui, "commands", lambda outputs, ports: {name: ["sh", "-c", "echo oh no"] for name in ports})
    with pytest.raises(StageError, match="oh no"):
        ui.serve(project.outputs.resolve())


@pytest.mark.slow
def test_both_pages_answer_and_stop(project, tmp_path):
    ports = {"PRTS_DAGSTER_PORT": str(ui.free_port()), "PRTS_MLFLOW_PORT": str(ui.free_port())}
    with (tmp_path / "ui.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "pipelines.ui"], env=os.environ | ports, stdout=log, stderr=log, cwd=project.folder
        )
    try:
        give_up = time.monotonic() + 200
        while "Ctrl-C" not in (tmp_path / "ui.log").read_text():
            assert server.poll() is None and time.monotonic() < give_up, (tmp_path / "ui.log").read_text()
            time.sleep(1)
        told = json.loads((project.outputs / "ui.json").read_text())
        assert told == {
            name: f"http://127.0.0.1:{ports[f'PRTS_{name.upper()}_PORT']}" for name in ("dagster", "mlflow")
        }
        for url in told.values():
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.status == 200
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    for port in ports.values():
        ui.require_free("Dagster", int(port))
