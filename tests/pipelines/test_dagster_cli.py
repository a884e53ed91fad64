"""Dagster's own commands on this project: check, list, materialise by selection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB_LOCATION = """
from tests.pipelines import stub_chain
from prts_core.store.run_stage import untracked
from prts_core.tracking import runs
runs.stage_run = untracked
stub_chain.declarations.STAGES.update(stub_chain.stubbed_stages())
from pipelines.definitions import definitions
defs = definitions()
"""


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@pytest.mark.slow
def test_assets_are_materialised_by_selection(project, monkeypatch):
    """Also the smoke test of the antlr pins: with another antlr the selection's parser dies."""
    monkeypatch.setenv("PRTS_ENV", "test")
    monkeypatch.setenv("PRTS_LAUNCH", "inline")
    location = project.folder / "stub_location.py"
    location.write_text(STUB_LOCATION)
    Path(os.environ["DAGSTER_HOME"]).mkdir(parents=True)
    command = [tool("dagster"), "asset", "materialize", "-f", str(location), "--partition", "metaworld"]
    project.run(*command, "--select", 'key:"quickstart/validate" or +key:"quickstart/convert"')
    assert project.calls() == ["collect metaworld", "convert metaworld", "validate metaworld"]
    project.run(*command, "--select", 'key:"quickstart/stats"')
    assert project.calls() == ["stats metaworld"]


@pytest.mark.slow
def test_dg_checks_and_lists_the_definitions(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PRTS_RECIPE", "configs/quickstart.yaml,configs/smoke.yaml")
    checked = subprocess.run([tool("dg"), "check", "defs"], capture_output=True, text=True, timeout=240)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    listed = subprocess.run([tool("dg"), "list", "defs", "--json"], capture_output=True, text=True, timeout=240)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    found = json.loads(listed.stdout[listed.stdout.index("{") :])
    jobs = {job["name"] for job in found["jobs"]}
    for recipe in ("quickstart", "smoke"):
        assert {f"{recipe}/collect", f"{recipe}/register"} <= {asset["asset_key"] for asset in found["assets"]}
        assert {f"{recipe}_{job}" for job in ("chain", "import_dataset", "nightly_benchmark")} <= jobs
