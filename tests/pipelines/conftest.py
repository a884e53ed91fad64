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

from tests.pipelines import stub_chain
from tests.stages import tiny_chain

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
    """The project's configs, dvc.yaml and stage files in a git repository of their own, stages replaced by stubs."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "prts_core" / "stages", folder / "prts_core" / "stages",
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for stage in stub_chain.chain.STAGES:  # code files that DVC watches, whether written yet or not
        (folder / "prts_core" / "stages" / f"{stage}.py").touch()
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc" / name)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (tmp_path / "shared" / "data" / "g1_bottle").mkdir(parents=True)
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
    for name in ("PRTS_RECIPE", "PRTS_OUTPUTS", "PRTS_STUB_BREAK"):
        monkeypatch.delenv(name, raising=False)
    for name, stage in list(stub_chain.chain.STAGES.items()):
        monkeypatch.setitem(stub_chain.chain.STAGES, name, stub_chain.stubbed(stage))
    if not hasattr(request, "param"):  # parametrised indirectly with "tracked": MLflow as in earnest, some seconds more
        monkeypatch.setattr(stub_chain.base, "stage_run", tiny_chain.untracked)
    monkeypatch.chdir(folder)
    return Project(folder, calls)


@pytest.fixture
def run_job(project: Project) -> Callable[..., dg.ExecuteInProcessResult]:
    """Run a job of the code location on a Dagster instance that lives in memory."""
    from pipelines.definitions import definitions

    def run(name: str, partition: str, **options) -> dg.ExecuteInProcessResult:
        job = definitions().resolve_job_def(name)
        with dg.DagsterInstance.ephemeral() as instance:
            return job.execute_in_process(instance=instance, partition_key=partition, raise_on_error=False, **options)

    return run
