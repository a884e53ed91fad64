"""Lineage from a registered model to raw files over real stage runs, also where later runs took their places."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.cli.main import main
from prts_core.errors import CheckpointError, StageError
from prts_core.files import list_tree, write_json
from prts_core.stages.base import Parent, Stage, StageResult, run_stage
from prts_core.tracking.lineage import trace
from tests.tracking.toy_package import CONTRACT, make, named, outcomes, register
from tests.tracking.toy_stages import ToyConfig, toy_stage

CHAIN = {"collect": (), "convert": ("collect",), "stats": ("convert",), "sft": ("convert", "stats")}


def run_chain(plan, outputs: Path, seed_text: str = "demo", caller: dict[str, str] | None = None) -> None:
    """Toy collect..sft, then benchmark (on sft) and package (on both), each with the real runner and tracker."""

    def work(name: str):
        def run(config, inputs, context):
            (context.output / "data.txt").write_text(f"{name} {seed_text}")
            if name == "collect":
                write_json(context.output / "files.json", list_tree(context.output))
            return StageResult({}, {}, ("files.json",) if name == "collect" else ())

        return run

    for name, parents in CHAIN.items():
        stage = toy_stage(name, work(name), parents)
        stage = replace(stage, config=lambda plan, _: ToyConfig(note=seed_text))
        run_stage(stage, plan, None, outputs, caller)
    made = make(plan, outputs, "w-" + seed_text, outcomes(118), benchmark_parents=("sft",), package_parents=("sft",))
    assert made["package"].contracts == {"policy": CONTRACT.fingerprint}


@pytest.fixture(scope="module")
def chain(plan, outputs):
    plan = named(plan, "line")
    run_chain(plan, outputs, caller={"dagster.run_id": "d-1"})
    register(plan, outputs, {"dagster.run_id": "d-2"})
    return plan


def test_the_way_leads_from_the_alias_to_the_raw_files(chain, outputs):
    lineage = trace("models:/line@champion", outputs, verify=True)
    assert lineage.model["model_uri"] == "models:/line/1" and lineage.model["dagster_run"] == "d-2"
    by_stage = {step.stage: step for step in lineage.steps.values()}
    assert by_stage.keys() == {"package", "benchmark", "sft", "stats", "convert", "collect"}
    assert {step.state for step in lineage.steps.values()} == {"on disk"} and not lineage.missing
    assert lineage.steps[lineage.root].stage == "package"
    assert by_stage["sft"].dagster_run == "d-1" and by_stage["sft"].mlflow_run and by_stage["sft"].git_sha
    raw = outputs / "runs" / "collect" / "line" / "output" / "data.txt"
    (row,) = by_stage["collect"].files
    assert (row["path"], row["size"]) == ("data.txt", raw.stat().st_size)


def test_a_package_folder_has_the_same_lineage(chain, outputs):
    folder = outputs / "runs" / "package" / "line" / "output"
    assert trace(str(folder), outputs).steps == trace("models:/line/1", outputs).steps
    with pytest.raises(CheckpointError, match="No such package"):
        trace(str(folder / "none"), outputs)
    with pytest.raises(StageError, match="no alias 'champoin'"):
        trace("models:/line@champoin", outputs)


def test_the_command_prints_a_tree_and_json(chain, outputs, capsys):
    assert main(["lineage", "models:/line@champion", "--outputs", str(outputs), "--verify"]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f" {name} ") for name in ("package", "benchmark", "sft", "stats", "convert", "collect")]
    assert (
        places == sorted(places) and "(above)" in shown and "data.txt  sha256:" in shown and "dagster run d-1" in shown
    )
    assert main(["lineage", "models:/line/1", "--outputs", str(outputs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["complete"] and len(told["steps"]) == 6
    assert main(["lineage", "models:/nothing/1", "--outputs", str(outputs)]) == 1
    assert "No registered model" in capsys.readouterr().err


def test_a_replaced_parent_is_told_and_followed_through_mlflow(plan, outputs):
    plan = named(plan, "moved")
    run_chain(plan, outputs, "first")
    register(plan, outputs)
    before = trace("models:/moved/1", outputs)
    run_chain(plan, outputs, "second")  # the same places now hold other results
    after = trace("models:/moved/1", outputs)
    assert after.steps.keys() == before.steps.keys() and not after.missing
    assert {step.state for step in after.steps.values()} == {"replaced"}
    for digest, step in after.steps.items():
        old = before.steps[digest]
        assert (step.stage, step.parents, step.mlflow_run) == (old.stage, old.parents, old.mlflow_run)
        assert step.content_digest == old.content_digest and "instead" in step.note
    (collect,) = [step for step in after.steps.values() if step.stage == "collect"]
    (row,) = collect.files  # kept by the run as an artifact
    assert row["path"] == "data.txt"


def test_a_step_that_nothing_remembers_is_lost_and_damage_is_found(plan, outputs, tmp_path, capsys):
    copy = tmp_path / "outputs"
    shutil.copytree(outputs / "runs", copy / "runs")
    folder = copy / "runs" / "package" / "line" / "output"
    shutil.rmtree(copy / "runs" / "collect" / "line")
    (copy / "runs" / "stats" / "line" / "output" / "data.txt").write_text("edited")
    lineage = trace(str(folder), copy, verify=True)
    states = {step.stage: step.state for step in lineage.steps.values()}
    assert states["collect"] == "lost" and states["stats"] == "damaged" and states["convert"] == "on disk"
    assert [step.stage for step in lineage.missing] == ["collect"]
    assert not (copy / "mlflow.db").exists()  # looking makes no store
    assert main(["lineage", str(folder), "--outputs", str(copy)]) == 1
    assert "lost (not on this disk)" in capsys.readouterr().out


def test_roles_with_a_partition_find_their_place(plan, outputs):
    plan = named(plan, "parted")

    def write(config, inputs, context):
        (context.output / "x").write_text(str(context.partition))
        return StageResult()

    split = Stage("convert", "", True, lambda plan, _: ToyConfig(), lambda *_: [], write)
    run_stage(split, plan, "metaworld", outputs)
    mixed = Stage(
        "pretrain", "", False, lambda plan, _: ToyConfig(),
        lambda *_: [Parent("convert:metaworld", "convert", "metaworld")], write,
    )  # fmt: skip
    made = run_stage(mixed, plan, None, outputs)
    lineage = trace(str(made.folder(outputs)), outputs)
    assert sorted(step.name for step in lineage.steps.values()) == ["convert:metaworld", "pretrain"]
