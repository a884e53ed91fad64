"""Every stage for real, tiny: once by `dvc repro`, then taken over by Dagster, which trains nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prts_core.config.load import load_plan
from prts_core.io.files import read_json
from prts_core.skills.digests import package_digest
from prts_core.stages import chain, declarations
from prts_core.store.run_stage import load_provenance

ROOT = Path(__file__).resolve().parents[2]
DVC_FILE = "configs/dvc/smoke/dvc.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dvc_repro_then_dagster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("configs", "prts_core/stages"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    for name in (".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, project / name)
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    bin_folder = Path(sys.executable).parent
    for name, value in {
        "PATH": f"{bin_folder}:/usr/bin:/bin",
        "PRTS_RECIPE": "configs/smoke.yaml",
        "PRTS_ENV": "local",
        "DAGSTER_HOME": str(project / "outputs" / "dagster"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PRTS_OUTPUTS", raising=False)

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=1000)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    plan = load_plan(project / "configs" / "smoke.yaml")
    outputs = project / "outputs"

    def state() -> dict[str, tuple[str, str]]:
        """stage -> (data version, when it was made)"""
        out = {}
        for stage, partition in declarations.steps(plan):
            manifest = chain.finished(stage, plan, partition, outputs)
            out[f"{stage} {partition}"] = manifest.digest, str(load_provenance(outputs, manifest)["finished"])
        return out

    run("prts", "dvc")
    run("dvc", "repro", DVC_FILE)
    made, lock = state(), (project / DVC_FILE).with_suffix(".lock").read_text()

    shown = run(sys.executable, "-m", "pipelines")
    assert state() == made
    assert (project / DVC_FILE).with_suffix(".lock").read_text() == lock
    assert "DEBUG" not in shown and "done    sft        metaworld_smoke" in shown
    report = read_json(outputs / "demo" / "report.json")
    assert report["model_uri"] == "models:/prts-smoke/1"
    assert set(report["tasks"]) == {"faucet-open", "faucet-close"}
    assert report["package_digest"] == package_digest(chain.finished("package", plan, None, outputs).folder(outputs))
