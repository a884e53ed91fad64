"""A small copy of the project with a stub chain: real Dagster, real DVC, real manifests, no robots."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from prts_core.store.run_stage import untracked
from tests.pipelines import stub_chain

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Project:
    """A working copy: `folder` is the current directory, `calls()` the stage functions that ran since the last look."""

    folder: Path
    calls_file: Path

    @property
    def outputs(self) -> Path:
        return Path("outputs")

    def calls(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Project:
    """The project's configs, dvc.yaml and behaviour versions in a git repository, stages replaced by stubs."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore", str(stub_chain.VERSIONS)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    recording = tmp_path / "shared" / "data" / "g1_bottle"
    recording.mkdir(parents=True)
    (recording / "episode.txt").write_text("one\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "prts").write_text(f'#!/bin/sh\nexec {sys.executable} {Path(stub_chain.__file__)} "$@"\n')
    (tools / "prts").chmod(0o755)
    calls = tmp_path / "calls.txt"
    for name, value in {
        "PATH": f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "PRTS_STUB_CALLS": str(calls),
        "PRTS_SHARED": str(tmp_path / "shared"),
        "DAGSTER_HOME": str(folder / "outputs" / "dagster"),
        "PRTS_ENV": "local",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("PRTS_RECIPE", "PRTS_OUTPUTS", "PRTS_SOURCES", "PRTS_STUB_BREAK", "PRTS_STUB_INTERRUPT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    for name, stage in stub_chain.stubbed_stages().items():
        monkeypatch.setitem(stub_chain.declarations.STAGES, name, stage)
    monkeypatch.setattr(stub_chain.chain, "register", stub_chain.stub_register)
    if hasattr(request, "param"):  # parametrised indirectly with "tracked": MLflow as in earnest, some seconds more
        monkeypatch.setenv("PRTS_STUB_TRACKED", "1")
    else:
        monkeypatch.setattr("prts_core.tracking.runs.stage_run", untracked)
    return Project(folder, calls)


@pytest.fixture
def run_job(project: Project) -> Callable[..., dg.ExecuteInProcessResult]:
    """Run a job of a recipe (`chain`, `import_dataset`, ...) on a Dagster instance that lives in memory."""
    from assets.recipes import recipe_pages
    from pipelines.definitions import build
    from pipelines.terminal import QUIET

    def run(name: str, partition: str, recipe: str = "quickstart", **options) -> dg.ExecuteInProcessResult:
        defs = build(recipe_pages(), project.outputs, launch="inline")
        job = defs.resolve_job_def(f"{recipe}_{name}")
        with dg.DagsterInstance.ephemeral() as instance:
            options = {"run_config": QUIET, "raise_on_error": False} | options
            return job.execute_in_process(instance=instance, partition_key=partition, **options)

    return run
