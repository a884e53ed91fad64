"""Where Dagster runs a stage: in a child by Pipes, over torchrun's ranks; what comes back from there."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.launch import Launcher, launch_resource
from assets.pipes_main import pack, unpack
from assets.recipes import RecipePage, recipe_pages
from pipelines.definitions import build
from pipelines.terminal import QUIET
from prts_core.config.load import load_plan
from prts_core.data.validation.report import Finding, ValidationFailed, ValidationReport
from prts_core.io.errors import ConfigError, Skipped, StageError, Stopped
from prts_core.io.files import read_json
from prts_core.launch.where import parse_launch
from prts_core.stages import chain
from prts_core.store.run_stage import untracked
from prts_core.store.views import view_folder
from tests.data.conftest import convert_toy, write_raw
from tests.pipelines import stub_child

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", [StageError, Skipped, Stopped])
def test_an_error_of_a_child_is_the_same_here(kind):
    error = kind("A thing is missing", file=Path("a/b"), field="x", found=3, expected=[1], cure="bring it")
    back = unpack(json.loads(json.dumps(pack(error))))
    assert type(back) is kind and str(back) == str(error).replace("'a/b'", "a/b")


def test_a_failed_validation_of_a_child_has_its_findings_here():
    findings = [Finding("laws", "a.json", "1", "2"), Finding("jumps", "b", "3", "4", row=7, severity="warning")]
    error = ValidationFailed(ValidationReport("toy", findings), "the report")
    back = unpack(json.loads(json.dumps(pack(error))))
    assert isinstance(back, ValidationFailed) and str(back) == str(error) and back.report.findings == findings


@pytest.fixture
def run_in_child(project, monkeypatch):
    """Run a job whose stages are processes of their own."""
    monkeypatch.setenv("PRTS_ENV", "test")

    def run(name: str, dataset: str) -> dg.ExecuteInProcessResult:
        child = launch_resource(Launcher("process", command=(sys.executable, stub_child.__file__)))
        job = build(recipe_pages(), project.outputs).resolve_job_def(f"quickstart_{name}")
        with dg.DagsterInstance.ephemeral() as instance:
            return job.execute_in_process(
                instance=instance,
                partition_key=dataset,
                run_config=QUIET,
                raise_on_error=False,
                resources={"launch": child},
            )

    return run


def test_a_stage_in_a_child_is_shown_as_one_in_the_step(project, run_in_child):
    result = run_in_child("data", "metaworld")
    assert result.success and len(project.calls()) == 4
    made = {e.asset_key.path[-1]: e.materialization for e in result.get_asset_materialization_events()}
    assert made["convert"].metadata["dagster/row_count"].value == 40
    assert len(result.get_asset_check_evaluations()) == 7


def test_a_skip_and_a_bug_in_a_child(project, run_in_child, monkeypatch):
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    skipped = run_in_child("data", "g1_bottle")
    assert skipped.success, [e.step_failure_data for e in skipped.get_step_failure_events()]
    assert skipped.get_asset_materialization_events() == []
    note = read_json(view_folder(project.outputs, "quickstart", "stats", "g1_bottle") / "manifest.json")
    assert note == {"skipped": "Dataset 'g1_bottle' is not on this machine"}
    monkeypatch.setenv("PRTS_STUB_BREAK", "collect")
    (failed,) = run_in_child("data", "metaworld").get_step_failure_events()
    assert "a bug in the stage's code" in failed.step_failure_data.user_failure_data.description
    assert project.calls() == ["collect metaworld"]  # a bug is not tried again


def test_what_launch_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="Unknown launch"):
        parse_launch("torchrum:2")


@pytest.mark.slow
def test_training_over_ranks_is_materialised(tmp_path, monkeypatch):
    """A real, tiny fine-tuning over two processes of torchrun."""
    pytest.importorskip("deepspeed")
    from tests.launch.test_stage_over_ranks import DATASET, RECIPE

    monkeypatch.setattr("prts_core.tracking.runs.stage_run", untracked)
    for name, value in {
        "PRTS_ENV": "test",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "TOY_ROOT": str(convert_toy(tmp_path, write_raw(tmp_path / "raw")).root),
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("datasets", "models"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "datasets/toy.yaml").write_text(DATASET)
    shutil.copy(ROOT / "configs/models/smoke.yaml", tmp_path / "models/m.yaml")
    monkeypatch.chdir(ROOT)
    outputs, page = tmp_path / "outputs", RecipePage(load_plan(tmp_path / "r.yaml"))
    for stage in ("collect", "convert", "validate", "stats"):
        chain.run(stage, page.plan, "toy", outputs)
    chain.run("pretrain", page.plan, None, outputs)
    job = dg.define_asset_job("train", dg.AssetSelection.assets(page.key("sft")))
    defs = dg.Definitions.merge(build([page], outputs, launch="torchrun:2"), dg.Definitions(jobs=[job]))
    split = {"sft": {"train": {"engine": "zero2"}}}
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("train").execute_in_process(
            instance=instance,
            partition_key="toy",
            raise_on_error=False,
            run_config=QUIET | {"resources": {page.resource: {"config": split}}},
        )
    assert result.success, [e.step_failure_data for e in result.get_step_failure_events()]
    (event,) = result.get_asset_materialization_events()
    assert "loss" in event.materialization.metadata
    assert Path(event.materialization.metadata["path"].value).exists()
