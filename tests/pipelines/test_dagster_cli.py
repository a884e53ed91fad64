"""Dagster's own commands on this project: check, list, materialise by selection, and the web page."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB_LOCATION = """
from tests.pipelines import stub_chain
from tests.stages import tiny_chain
stub_chain.base.stage_run = tiny_chain.untracked
stages = stub_chain.chain.STAGES
stages.update({name: stub_chain.stubbed(stage) for name, stage in stages.items()})
from pipelines.definitions import definitions
defs = definitions()
"""


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@pytest.fixture
def location(project, monkeypatch) -> Path:
    """A file that is this project's code location with the stub chain."""
    monkeypatch.setenv("PRTS_ENV", "test")
    path = project.folder / "stub_location.py"
    path.write_text(STUB_LOCATION)
    Path(os.environ["DAGSTER_HOME"]).mkdir(parents=True)
    return path


@pytest.mark.slow
def test_assets_are_materialised_by_selection(project, location):
    """Also the smoke test of the antlr pins: with another antlr the selection's parser dies."""
    command = [tool("dagster"), "asset", "materialize", "-f", str(location), "--partition", "metaworld"]
    project.run(*command, "--select", "key:validate or +key:convert")
    assert project.calls() == ["collect metaworld", "convert metaworld", "validate metaworld"]
    project.run(*command, "--select", "stats")
    assert project.calls() == ["stats metaworld"]


@pytest.mark.slow
def test_dg_checks_and_lists_the_definitions(monkeypatch):
    monkeypatch.chdir(ROOT)
    checked = subprocess.run([tool("dg"), "check", "defs"], capture_output=True, text=True, timeout=240)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    listed = subprocess.run([tool("dg"), "list", "defs", "--json"], capture_output=True, text=True, timeout=240)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    found = json.loads(listed.stdout[listed.stdout.index("{") :])
    assert {asset["asset_key"] for asset in found["assets"]} >= {"collect", "register"}
    assert {job["name"] for job in found["jobs"]} >= {"demo", "import_dataset", "nightly_benchmark"}


def ask(port: int, query: str) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        json.dumps({"query": query}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())["data"]


@pytest.mark.slow
def test_dagster_dev_serves_the_assets(project, location):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [tool("dagster"), "dev", "-f", str(location), "--host", "127.0.0.1", "--port", str(port)]
    with (project.folder / "dev.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        nodes: list = []
        for _ in range(180):
            time.sleep(1)
            try:
                nodes = ask(port, "{ assetNodes { assetKey { path } groupName hasAssetChecks } }")["assetNodes"]
            except OSError:
                continue
            if nodes:
                break
        groups = {node["assetKey"]["path"][0]: node["groupName"] for node in nodes}
        assert groups["collect"] == "data" and groups["package"] == "delivery", (project.folder / "dev.log").read_text()
        checked = {n["assetKey"]["path"][0] for n in nodes if n["hasAssetChecks"]}
        assert checked == {"validate", "benchmark", "value", "regression"}
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
