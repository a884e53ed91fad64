"""Dagster and DVC over the same outputs: whichever ran first, the other executes nothing."""

from __future__ import annotations

import shutil

import pytest
import yaml

from assets.resources import DvcResource
from prts_core.config.load import load_plan
from prts_core.errors import StageError
from prts_core.files import read_json
from prts_core.stages import chain
from prts_core.stages.base import load_manifest

DVC_STAGES = ("collect", "convert", "validate", "stats", "pretrain", "sft", "subtask", "benchmark", "value", "package")


def versions(project) -> dict[str, str]:
    plan = load_plan(project.folder / "configs" / "quickstart.yaml")
    return {
        f"{stage} {partition}": load_manifest(project.outputs, stage, plan.recipe.name, partition).digest
        for stage, partition in chain.steps(plan)
        if stage in DVC_STAGES
    }


def dagster_versions(*results) -> dict[str, str]:
    return {
        f"{e.asset_key.to_user_string()} {e.partition}": e.materialization.tags["dagster/data_version"]
        for result in results
        for e in result.get_asset_materialization_events()
        if e.asset_key.to_user_string() in DVC_STAGES
    }


def test_dvc_repro_after_a_dagster_run_executes_nothing(project, run_job):
    assert run_job("demo", "metaworld").success
    assert run_job("import_dataset", "g1_bottle").success
    assert len(project.calls()) == 16
    assert "up to date" in project.run("dvc", "status").stdout
    said = project.run("dvc", "repro").stdout
    assert "Running stage" not in said
    assert said.count("didn't change, skipping") == 15
    assert project.calls() == []


def test_a_dagster_run_after_dvc_repro_runs_nothing_and_has_the_same_versions(project, run_job):
    project.run("dvc", "repro")
    assert len(project.calls()) == 15  # everything but register
    before, lock = versions(project), (project.folder / "dvc.lock").read_text()
    results = run_job("demo", "metaworld"), run_job("import_dataset", "g1_bottle")
    assert all(result.success for result in results)
    assert project.calls() == ["register -"]
    assert dagster_versions(*results) == before
    assert (project.folder / "dvc.lock").read_text() == lock


def test_dvc_repro_after_a_change_runs_what_follows_from_it(project, run_job):
    assert run_job("demo", "metaworld").success
    project.calls()
    recipe = project.folder / "configs" / "quickstart.yaml"
    plain = yaml.safe_load(recipe.read_text())
    plain["sft"]["train"]["steps"] = 5
    recipe.write_text(yaml.safe_dump(plain, sort_keys=False))
    project.run("dvc", "repro", "package")
    assert project.calls() == ["sft metaworld", "benchmark -", "value -", "package -"]


def test_skipped_partitions_are_up_to_date_too(project, run_job, monkeypatch):
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    assert run_job("demo", "metaworld").success
    assert run_job("import_dataset", "g1_bottle").success
    assert "Running stage" not in project.run("dvc", "repro").stdout


def test_an_interrupted_stage_keeps_its_work_under_dvc(project):
    """`persist: true`: dvc repro must not clear the run folder that resume state lies in."""
    project.run("dvc", "repro", "collect@metaworld")
    folder = project.outputs / "runs" / "collect" / "quickstart" / "metaworld"
    declared = yaml.safe_load((project.folder / "dvc.yaml").read_text())["stages"]
    for stage in declared.values():
        for out in stage.get("do", stage)["outs"]:
            ((path, options),) = out.items()
            assert options["persist"] is True
            assert path.endswith(("/output", "/manifest.json"))
    assert (folder / "provenance.json").exists()
    (folder / "output" / "data" / "content.txt").unlink()
    project.calls()
    project.run("dvc", "repro", "collect@metaworld")
    assert project.calls() == ["collect metaworld"]  # the damage was seen and made good


def test_what_dvc_does_not_know_is_left_alone(project, run_job):
    from pipelines.environments import plan as plan_of

    plan = plan_of()
    assert run_job("demo", "metaworld").success
    loaded = plan.load()
    dvc, off = DvcResource(), DvcResource(enabled=False)
    manifest = load_manifest(project.outputs, "register", "quickstart", None)
    assert "no stage 'register'" in dvc.commit(manifest, project.outputs)
    assert "switched off" in off.commit(manifest, project.outputs)
    shutil.copytree(project.outputs / "runs", "elsewhere/runs")
    made = load_manifest(project.outputs, "collect", loaded.recipe.name, "metaworld")
    assert "another recipe's folder" in dvc.commit(made, project.folder / "elsewhere")
    shutil.rmtree(project.folder / ".dvc")
    assert "no DVC repository" in dvc.commit(made, project.outputs)


def test_a_locked_dvc_is_told_in_one_paragraph(project, run_job):
    from dvc.repo import Repo

    assert run_job("demo", "metaworld").success
    made = load_manifest(project.outputs, "collect", "quickstart", "metaworld")
    with Repo(str(project.folder)) as repo, repo.lock:
        process = project.folder / "try.py"
        process.write_text(
            "from pathlib import Path\nfrom assets.resources import DvcResource\n"
            "from prts_core.stages.base import load_manifest\n"
            "out = Path('outputs')\n"
            "try:\n    DvcResource().commit(load_manifest(out, 'collect', 'quickstart', 'metaworld'), out)\n"
            "except ValueError as err:\n    print(err)\n"
        )
        import sys

        said = project.run(sys.executable, str(process)).stdout
    assert "the output itself is in place" in said
    assert "dvc commit -f collect@metaworld" in said
    with pytest.raises(StageError, match="could not take over"):
        (project.folder / "dvc.yaml").write_text("stages: [broken\n")
        DvcResource().commit(made, project.outputs)


def test_dvc_yaml_declares_the_chain(project):
    """Commands, parents and files in dvc.yaml are those of the chain; a new stage or parent must be written there."""
    plan = load_plan(project.folder / "configs" / "quickstart.yaml")
    resolved = {}
    from dvc.repo import Repo

    with Repo(str(project.folder)) as repo:
        for stage in repo.index.stages:
            resolved[stage.addressing] = stage
    expected = {f"{s}@{p}" if p else s for s, p in chain.steps(plan) if s != "register"}
    assert set(resolved) == expected
    for stage, partition in chain.steps(plan):
        if stage == "register":
            continue
        declared = resolved[f"{stage}@{partition}" if partition else stage]
        option = f" --dataset {partition}" if partition else ""
        assert declared.cmd == f"prts {stage} --config configs/quickstart.yaml{option}"
        deps = {dep.def_path for dep in declared.deps}
        assert f"prts_core/stages/{stage}.py" in deps
        for parent in chain.STAGES[stage].parents(plan, partition):
            folder = f"outputs/runs/{parent.stage}/quickstart" + (f"/{parent.partition}" if parent.partition else "")
            assert {f"{folder}/output", f"{folder}/manifest.json"} <= deps, (stage, parent)


def test_the_lock_holds_what_was_run(project, run_job):
    assert run_job("demo", "metaworld").success
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]
    assert lock["sft@metaworld"]["params"]["configs/quickstart.yaml"]["seed"] == 7
    assert {out["path"].rsplit("/", 1)[1] for out in lock["package"]["outs"]} == {"output", "manifest.json"}
    manifest = read_json(project.outputs / "runs" / "package" / "quickstart" / "manifest.json")
    assert manifest["kind"] == "package"


def test_a_recipe_without_a_watched_section_is_told(project, run_job):
    recipe = project.folder / "configs" / "quickstart.yaml"
    plain = yaml.safe_load(recipe.read_text())
    del plain["value"]
    recipe.write_text(yaml.safe_dump(plain, sort_keys=False))
    (failed,) = run_job("demo", "metaworld").get_step_failure_events()
    said = failed.step_failure_data.user_failure_data.description
    assert failed.step_key == "value"
    assert "Parameters 'value' are missing" in said and "`value: {}`" in said
    recipe.write_text(recipe.read_text() + "value: {}\n")
    assert run_job("demo", "metaworld").success
