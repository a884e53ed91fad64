"""Lineage from a registered model to raw files over real stage runs, also where results are gone or were made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.cli.main import main
from prts_core.delivery.lineage import Lineage, trace
from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.files import read_json, write_json
from prts_core.store.listing import list_files
from prts_core.store.run_stage import Store
from prts_core.store.stage import Parent, Stage, StageResult
from prts_core.tracking.runs import stage_run
from prts_core.tracking.store import client
from tests.fixtures.toy_package import CONTRACT, named, outcomes, register, toy_report, write_package, write_timing
from tests.fixtures.toy_stages import ToyConfig, toy_stage, toy_work

PARENTS = {
    "collect": (),
    "convert": ("collect",),
    "stats": ("convert",),
    "sft": ("convert", "stats"),
    "benchmark": ("sft",),
    "package": ("benchmark", "sft"),
}


def chain_of(text: str) -> dict[str, Stage]:
    """Toy collect..package. text: what differs between two plans; it stands in every configuration and every file."""

    def work(name: str):
        def run(config, inputs, context):
            (context.output / "data.txt").write_text(f"{name} {text}")
            if name == "collect":
                write_json(context.output / "files.json", [f.row for f in list_files(context.output)])
                return StageResult(artifacts=("files.json",))
            if name == "benchmark":
                outcomes(118).write_parquet(context.output / "episodes.parquet")
                write_json(context.output / "report.json", toy_report())
            if name == "package":
                (context.output / "data.txt").unlink()
                write_package(context.output, text)
                write_timing(context.work)
                return StageResult({}, {"policy": CONTRACT.fingerprint})
            return StageResult()

        return run

    return {
        name: replace(toy_stage(name, work(name), parents), config=lambda plan, _: ToyConfig(note=text))
        for name, parents in PARENTS.items()
    }


def run_chain(plan, outputs: Path, text: str, caller: dict[str, str] | None = None) -> Store:
    store = Store(outputs, chain_of(text))
    for name in PARENTS:
        store.run(name, plan, caller=caller, track=stage_run)
    return store


def states(lineage: Lineage) -> dict[str, str]:
    return {step.stage: step.state for step in lineage.steps.values()}


def forget(outputs: Path, stage: str) -> None:
    """Remove a stage's only result, as `prts gc` would."""
    for path in outputs.glob(f"store/{stage}/*"):
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def chain(plan, outputs):
    plan = named(plan, "line")
    run_chain(plan, outputs, "demo", caller={"dagster.run_id": "d-1"})
    register(plan, outputs, {"dagster.run_id": "d-2"})
    return plan


@pytest.fixture
def copy(chain, outputs, tmp_path) -> Path:
    """Another place with the same results, to be damaged."""
    target = tmp_path / "outputs"
    shutil.copytree(outputs, target)
    return target


def test_the_way_leads_from_the_alias_to_the_raw_files(chain, outputs):
    lineage = trace("models:/line@champion", outputs, verify=True)
    assert lineage.model["model_uri"] == "models:/line/1" and lineage.model["dagster_run"] == "d-2"
    by_stage = {step.stage: step for step in lineage.steps.values()}
    assert by_stage.keys() == PARENTS.keys()
    assert {step.state for step in lineage.steps.values()} == {"on disk"} and not lineage.missing
    assert lineage.steps[lineage.root].stage == "package"
    sft = by_stage["sft"]
    assert sft.dagster_run == "d-1" and sft.mlflow_run and sft.mlflow_url and sft.git_sha
    assert (sft.recipe, sft.version, sft.path) == ("line", 1, f"store/sft/{sft.key}/output")
    assert sft.parents == {name: by_stage[name].digest for name in ("convert", "stats")}
    (row,) = by_stage["collect"].files
    raw = outputs / by_stage["collect"].path / "data.txt"
    assert (row["path"], row["size"]) == ("data.txt", raw.stat().st_size)


def test_a_package_folder_has_the_same_lineage(chain, outputs, tmp_path):
    steps = trace("models:/line/1", outputs).steps
    view = outputs / "runs" / "line" / "package" / "output"
    assert trace(str(view), outputs).steps == steps
    (stored,) = outputs.glob("store/package/*/output")
    assert trace(str(stored), outputs).steps == steps
    shutil.copytree(stored, tmp_path / "elsewhere")  # recognised by its content
    assert trace(str(tmp_path / "elsewhere"), outputs).steps == steps
    with pytest.raises(CheckpointError, match="No such package"):
        trace(str(view / "none"), outputs)
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="Nothing here knows"):
        trace(str(tmp_path / "unknown"), outputs)
    with pytest.raises(StageError, match="no alias 'champoin'"):
        trace("models:/line@champoin", outputs)


def test_the_command_prints_a_tree_and_json(chain, outputs, capsys):
    assert main(["lineage", "models:/line@champion", "--outputs", str(outputs), "--verify"]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f" {name} ") for name in ("package", "benchmark", "sft", "stats", "convert", "collect")]
    assert places == sorted(places)
    assert "(above)" in shown and "data.txt  sha256:" in shown and "dagster run d-1" in shown
    assert main(["lineage", "models:/line/1", "--outputs", str(outputs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["complete"] and len(told["steps"]) == 6
    assert main(["lineage", "models:/nothing/1", "--outputs", str(outputs)]) == 1
    assert "No registered model" in capsys.readouterr().err


def test_another_plan_takes_nothing_from_an_earlier_models_lineage(chain, outputs):
    before = trace("models:/line/1", outputs)
    run_chain(chain, outputs, "second")  # the recipe's views show other results now
    assert trace("models:/line/1", outputs, verify=True) == before
    assert set(states(before).values()) == {"on disk"}


def test_results_that_are_gone_are_followed_through_mlflow(plan, outputs):
    plan = named(plan, "cleared")
    run_chain(plan, outputs, "cleared")
    register(plan, outputs)
    before = trace("models:/cleared/1", outputs)
    for step in before.steps.values():
        shutil.rmtree(outputs / "store" / step.stage / step.key)
    after = trace("models:/cleared/1", outputs)
    assert after.steps.keys() == before.steps.keys() and not after.missing
    assert set(states(after).values()) == {"gone"}
    for digest, step in after.steps.items():
        old = before.steps[digest]
        for field in ("key", "stage", "recipe", "version", "parents", "mlflow_run", "content_digest", "config_digest"):
            assert getattr(step, field) == getattr(old, field), field
    (collect,) = [step for step in after.steps.values() if step.stage == "collect"]
    (row,) = collect.files  # kept by the run as an artifact
    assert row["path"] == "data.txt"


def test_a_result_that_was_made_again_and_came_out_different_is_told(copy, capsys):
    (path,) = [p for p in copy.glob("store/stats/*/manifest.json") if _note(p) == "demo"]
    raw = read_json(path)
    old = raw.pop("digest")
    path.unlink()
    from prts_core.store.manifest import Manifest

    Manifest(**(raw | {"content_digest": "sha256:" + "1" * 64})).save(path)
    lineage = trace("models:/line/1", copy)
    (step,) = [step for step in lineage.steps.values() if step.stage == "stats"]
    assert (step.state, step.digest) == ("remade", old) and read_json(path)["digest"][:19] in step.note
    assert step.content_digest == raw["content_digest"]  # as MLflow recorded it
    assert states(lineage)["convert"] == states(lineage)["collect"] == "on disk" and not lineage.missing
    (copy / "mlflow.db").unlink()
    (folder,) = [p.parent for p in copy.glob("store/package/*/manifest.json") if _note(p) == "demo"]
    again = trace(str(folder / "output"), copy)
    assert states(again)["stats"] == "remade" and states(again)["convert"] == "on disk"  # its parents' keys are known
    assert main(["lineage", str(folder / "output"), "--outputs", str(copy)]) == 0
    assert "remade (" in capsys.readouterr().out


def _note(manifest: Path) -> str:
    return read_json(manifest)["config"]["note"]


def test_a_step_that_nothing_remembers_is_lost_and_damage_is_found(copy, capsys):
    (copy / "mlflow.db").unlink()
    (folder,) = [p.parent / "output" for p in copy.glob("store/package/*/manifest.json") if _note(p) == "demo"]
    forget(copy, "collect")
    for data in copy.glob("store/stats/*/output/data.txt"):
        data.chmod(0o644)
        data.write_text("edited")
    lineage = trace(str(folder), copy, verify=True)
    found = states(lineage)
    assert found["collect"] == "lost" and found["stats"] == "damaged" and found["convert"] == "on disk"
    assert [step.stage for step in lineage.missing] == ["collect"]
    assert not (copy / "mlflow.db").exists()  # looking makes no store
    assert main(["lineage", str(folder), "--outputs", str(copy)]) == 1
    assert "lost (not on this disk)" in capsys.readouterr().out


def test_results_without_their_provenance_have_mlflows_links(copy):
    for path in copy.glob("store/*/*/provenance.json"):
        path.write_text('{"adopted": "2027-01-01", "recipe": "line"}')  # as `dvc pull` brings them
    lineage = trace("models:/line/1", copy)
    assert all(step.state == "on disk" and step.mlflow_run and step.git_sha for step in lineage.steps.values())


def test_steps_of_one_stage_are_told_apart_by_dataset(plan, outputs):
    def write(config, inputs, context):
        (context.output / "x").write_text(str(context.partition))
        return StageResult()

    def configured(plan, partition):
        return ToyConfig(note=f"parted {partition}")

    datasets = ("metaworld", "g1_bottle")
    parents = [Parent(f"convert:{name}", "convert", name) for name in datasets]
    stages = {
        "convert": Stage("convert", "", 1, True, configured, lambda *_: [], write),
        "pretrain": Stage("pretrain", "", 1, False, configured, lambda *_: parents, write),
    }
    store = Store(outputs, stages)
    for name in datasets:
        store.run("convert", named(plan, "parted"), name, track=stage_run)
    made = store.run("pretrain", named(plan, "parted"), track=stage_run)
    lineage = trace(str(made.folder(outputs)), outputs)
    assert sorted(step.name for step in lineage.steps.values()) == [
        "convert:g1_bottle",
        "convert:metaworld",
        "pretrain",
    ]


def test_a_mixture_of_forty_datasets_is_followed_through_mlflow(plan, outputs):
    """120 parents, more than one tag holds; with nothing left on disk."""
    from prts_core.store.manifest import Manifest

    inputs = {}
    for number in range(40):
        for stage in ("convert", "validate", "stats"):
            key = f"{stage[0]}{number:019x}"
            inputs[f"{stage}:robot_{number}"] = Manifest(
                stage, key, 1, f"robot_{number}", {}, {}, {}, None, "", f"sha256:{key:0>64}"
            )
    work = toy_work(outputs, inputs, key="mixture", stage="pretrain")
    keys, digests = {r: m.key for r, m in inputs.items()}, {r: m.digest for r, m in inputs.items()}
    made = Manifest("pretrain", "mixture", 1, None, {}, keys, digests, 7, "", "sha256:" + "9" * 64)
    with stage_run(work) as tracked:
        tracked.finish(made, StageResult(), work.folder / "output")
    client(outputs).create_registered_model("mixture")
    tags = {"prts.manifest_digest": made.digest, "prts.key": made.key}
    client(outputs).create_model_version("mixture", "file:///nowhere", tags=tags)
    lineage = trace("models:/mixture/1", outputs)
    assert lineage.steps[lineage.root].state == "gone" and lineage.steps[lineage.root].parents == digests
    assert len(lineage.missing) == 120
    assert {(s.key, s.digest, s.stage, s.partition) for s in lineage.missing} == {
        (m.key, m.digest, m.kind, m.partition) for m in inputs.values()
    }


def test_runs_from_before_there_were_keys_are_followed_by_digest(outputs):
    store = client(outputs)
    experiment = store.create_experiment("old")

    def run(stage: str, digest: str, parents: dict[str, str]) -> None:
        tags = {"prts.stage": stage, "prts.recipe": "old", "prts.manifest_digest": digest, "prts.version": "0.1.0"}
        store.create_run(experiment, tags=tags | {"prts.parents": json.dumps(parents)})

    run("package", "sha256:aa", {"sft": "sha256:bb"})
    run("sft", "sha256:bb", {})
    store.create_registered_model("old")
    store.create_model_version("old", "file:///nowhere", tags={"prts.manifest_digest": "sha256:aa"})
    assert states(trace("models:/old/1", outputs)) == {"package": "gone", "sft": "gone"}
