"""MLflow runs around real stage runs: what is recorded, how a run fails, and how a killed one goes on."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.errors import MissingExtraError, StageError
from prts_core.files import read_json
from prts_core.stages.base import StageResult, run_stage
from prts_core.tracking import runs
from prts_core.tracking.runs import flatten
from prts_core.tracking.store import client, run_url, tracking_uri
from tests.tracking.toy_stages import toy_stage, write_and_report


def provenance(outputs: Path, stage: str) -> dict:
    return read_json(outputs / "runs" / stage / "quickstart" / "provenance.json")


def run_of(outputs: Path, stage: str):
    return client(outputs).get_run(provenance(outputs, stage)["mlflow"]["run_id"])


def test_a_stage_leaves_one_complete_run(plan, outputs):
    caller = {"dagster.run_id": "d-1", "dagster.asset_key": "first", "dagster.code_version": "1"}
    first = run_stage(toy_stage("first", write_and_report), plan, None, outputs, caller)
    second = run_stage(toy_stage("second", write_and_report, ("first",)), plan, None, outputs, caller)
    run = run_of(outputs, "second")
    store = client(outputs)

    assert (run.info.status, run.info.run_name) == ("FINISHED", "second")
    assert store.get_experiment(run.info.experiment_id).name == "quickstart"
    assert run.data.params["rate"] == "0.5" and run.data.params["tasks.1.name"] == "close"
    assert len(run.data.params["note"]) == 6000
    assert run.data.metrics == {"loss/total": pytest.approx(1 / 3), "lr": 0.1, "success_rate": 0.9}
    curve = store.get_metric_history(run.info.run_id, "loss/total")
    assert [(point.step, point.value) for point in curve] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]

    tags = run.data.tags
    assert tags["dagster.run_id"] == "d-1" and tags["dagster.asset_key"] == "first"
    assert tags["prts.manifest_digest"] == second.digest and tags["prts.config_digest"] == second.config_digest
    assert json.loads(tags["prts.parents"]) == {"first": first.digest}
    assert tags["prts.contract.policy"] == "sha256:c0" and tags["prts.attempts"] == "1"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert tags["git.sha"] == (head.stdout.strip() or "none")
    assert {"git.sha", "dvc.rev"} <= tags.keys()

    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "first" and len(dataset.dataset.digest) == 36
    assert first.content_digest.startswith("sha256:" + dataset.dataset.digest)
    assert {tag.key: tag.value for tag in dataset.tags} == {
        "mlflow.data.context": "first",
        "prts.content_digest": first.content_digest,
        "prts.manifest_digest": first.digest,
    }
    files = {item.path for item in store.list_artifacts(run.info.run_id)}
    assert files == {"config.json", "report.json", "plots"}
    assert (outputs / "mlartifacts" / "quickstart" / run.info.run_id / "artifacts" / "plots" / "curve.txt").exists()
    # a stage without parents records what it made itself: raw recordings are the first dataset
    (recorded,) = run_of(outputs, "first").inputs.dataset_inputs
    assert first.content_digest.startswith("sha256:" + recorded.dataset.digest)


def test_links_lead_to_the_run_and_a_finished_stage_opens_none(plan, outputs):
    stage = toy_stage("linked", write_and_report)
    made = run_stage(stage, plan, None, outputs)
    links = provenance(outputs, "linked")["mlflow"]
    uri = tracking_uri(outputs)
    assert links["url"] == run_url(uri, links["experiment_id"], links["run_id"]) and uri.startswith("sqlite:///")
    assert all(isinstance(value, str) for value in links.values()) and "fault" not in links
    before = len(client(outputs).search_runs([links["experiment_id"]]))
    assert run_stage(stage, plan, None, outputs) == made
    assert len(client(outputs).search_runs([links["experiment_id"]])) == before


def test_a_failed_stage_ends_failed_and_its_retry_goes_on_in_the_same_run(plan, outputs):
    broken = [True]

    def flaky(config, inputs, context):
        context.log({"loss": 1.0}, 1)
        context.log({"loss": 0.5}, 2)
        if broken[0]:
            raise StageError("The gripper fell off", cure="screw it on")
        context.log({"loss": 0.25}, 3)
        (context.output / "x").write_text("x")
        return StageResult({"final": 0.25})

    stage = toy_stage("flaky", flaky)
    with pytest.raises(StageError, match="gripper"):
        run_stage(stage, plan, None, outputs)
    (work,) = (outputs / "runs" / "flaky" / "quickstart").glob("work-*")
    run_id = read_json(work / "mlflow.json")["run_id"]
    failed = client(outputs).get_run(run_id)
    assert failed.info.status == "FAILED" and "gripper fell off" in failed.data.tags["prts.error"]

    broken[0] = False
    run_stage(stage, plan, None, outputs)
    again = run_of(outputs, "flaky")
    assert again.info.run_id == run_id and again.info.status == "FINISHED"
    assert again.data.tags["prts.attempts"] == "2" and "prts.error" not in again.data.tags
    steps = [point.step for point in client(outputs).get_metric_history(run_id, "loss")]
    assert steps == [1, 2, 3]  # steps 1 and 2 came twice and stand once


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.tracking.toy_stages import toy_stage
from prts_core.config.load import load_plan
from prts_core.stages.base import StageResult, run_stage

def slow(config, inputs, context):
    done = context.work / "done"
    for step in range(1, 4):
        context.log({{"loss": 1.0 / step}}, step)
    if not done.exists():
        done.touch()
        time.sleep(60)
    (context.output / "x").write_text("x")
    return StageResult({{"final": 1.0}})

run_stage(toy_stage("slow", slow), load_plan(Path({config!r})), None, Path({outputs!r}))
"""


def test_a_killed_stage_goes_on_in_the_same_run(plan, outputs):
    code = KILLED.format(root=str(Path(__file__).parents[2]), config=str(plan.path), outputs=str(outputs))
    process = subprocess.Popen([sys.executable, "-c", code])
    folder = outputs / "runs" / "slow" / "quickstart"
    try:
        for _ in range(2400):  # importing MLflow on a busy machine takes its time
            if list(folder.glob("work-*/done")):
                break
            assert process.poll() is None
            threading.Event().wait(0.05)
        (kept,) = folder.glob("work-*/mlflow.json")
        run_id = read_json(kept)["run_id"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert client(outputs).get_run(run_id).info.status == "RUNNING"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    again = run_of(outputs, "slow")
    assert again.info.run_id == run_id and again.info.status == "FINISHED"
    assert [p.step for p in client(outputs).get_metric_history(run_id, "loss")] == [1, 2, 3]


def test_an_interrupted_stage_ends_killed(plan, outputs):
    def interrupted(config, inputs, context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(toy_stage("interrupted", interrupted), plan, None, outputs)
    (kept,) = outputs.glob("runs/interrupted/quickstart/work-*/mlflow.json")
    assert client(outputs).get_run(read_json(kept)["run_id"]).info.status == "KILLED"


def test_stages_in_many_threads_share_the_store(plan, outputs):
    recipes = [replace(plan, recipe=replace(plan.recipe, name=f"thread-{i}")) for i in range(4)]
    threads = [
        threading.Thread(target=run_stage, args=(toy_stage("threaded", write_and_report), one, None, outputs))
        for one in recipes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in recipes:
        links = read_json(outputs / "runs" / "threaded" / one.recipe.name / "provenance.json")["mlflow"]
        run = client(outputs).get_run(links["run_id"])
        assert run.info.status == "FINISHED" and run.data.metrics["success_rate"] == 0.9
        assert client(outputs).get_experiment(links["experiment_id"]).name == one.recipe.name


def test_a_server_that_fails_half_way_costs_no_work_and_is_told(plan, outputs, caplog):
    from mlflow.exceptions import MlflowException

    def cut_off(config, inputs, context):
        tracked = context.log.__self__
        tracked.store = Deaf(tracked.store, MlflowException("connection lost"))
        return write_and_report(config, inputs, context)

    with caplog.at_level(logging.WARNING, "prts.tracking"):
        run_stage(toy_stage("cut-off", cut_off), plan, None, outputs)
    assert sum("does not take" in record.message for record in caplog.records) == 1
    fault = provenance(outputs, "cut-off")["mlflow"]["fault"]
    assert "connection lost" in fault and "metrics" in fault and "artifact report.json" in fault


class Deaf:
    """A real client whose server has gone: every call raises what MLflow raises then."""

    def __init__(self, store, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            raise self._error

        return call


def test_a_store_that_cannot_be_opened_is_one_clear_error(plan, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a database, and long enough to be taken for a damaged one " * 20)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{blocked}")
    with pytest.raises(StageError, match=r"MLflow store cannot be opened.*MLFLOW_TRACKING_URI"):
        run_stage(toy_stage("blocked", write_and_report), plan, None, tmp_path / "outputs")


def test_without_mlflow_the_stage_runs_and_says_so_once(plan, tmp_path, monkeypatch, caplog):
    def missing(outputs):
        raise MissingExtraError("This needs the package 'mlflow'", cure="pip install 'prts[pipeline]'")

    monkeypatch.setattr("prts_core.tracking.store.client", missing)
    monkeypatch.setattr(runs, "_said_missing", threading.Event())
    with caplog.at_level(logging.WARNING, "prts.tracking"):
        run_stage(toy_stage("one", write_and_report), plan, None, tmp_path)
        run_stage(toy_stage("two", write_and_report), plan, None, tmp_path)
    assert [r.message for r in caplog.records if "not tracked" in r.message] == [caplog.records[0].message]
    assert provenance(tmp_path, "two")["mlflow"] == {}


def test_flatten_names_every_leaf():
    plain = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}], "f": {}, "odd key!": True}
    assert flatten(plain) == {
        "a.b": "1", "a.c": "[1, 2]", "d.0.e": "null", "f": "{}", "odd key_": "true",
    }  # fmt: skip


def test_importing_the_tracker_does_not_import_mlflow():
    code = "import sys, prts_core.tracking.runs, prts_core.tracking.store; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
