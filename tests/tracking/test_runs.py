"""MLflow runs around real stage runs: what is recorded, how a run fails, and how a killed one goes on."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.io.errors import MissingExtraError, Skipped, StageError, Stopped, install_extra
from prts_core.io.files import read_json
from prts_core.store.stage import StageResult
from prts_core.tracking import outbox, runs
from prts_core.tracking.describe import TAG_CHARS, flatten, parents_of, split_tag
from prts_core.tracking.runs import stage_run
from prts_core.tracking.store import client, run_url, tracking_uri
from tests.fixtures.toy_stages import (
    ToyConfig,
    provenance,
    run_of,
    run_toys,
    toy_manifest,
    toy_stage,
    toy_work,
    write_and_report,
)


def kept_run(outputs: Path, stage: str):
    """The run that an interrupted attempt left behind."""
    (kept,) = outputs.glob(f"store/{stage}/*/work/mlflow.json")
    return client(outputs).get_run(read_json(kept)["run_id"])


def test_a_stage_leaves_one_complete_run(plan, outputs, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-pony")
    caller = {"dagster.run_id": "d-1", "dagster.asset_key": "first", "dagster.code_version": "1"}
    stages = toy_stage("first", write_and_report), toy_stage("second", write_and_report, ("first",))
    made = run_toys(plan, outputs, *stages, caller=caller)
    first, second = made["first"], made["second"]
    run = run_of(outputs, second)
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
    assert tags["prts.manifest_digest"] == second.digest and tags["prts.content_digest"] == second.content_digest
    assert (tags["prts.stage"], tags["prts.recipe"], tags["prts.key"]) == ("second", "quickstart", second.key)
    assert (tags["prts.version"], tags["prts.overrides"], tags["dvc.exp"]) == ("1", "none", "brave-pony")
    assert tags["prts.program"] != "1" and tags["prts.config_digest"].startswith("sha256:")
    assert parents_of(tags) == {"first": (first.key, first.digest)}
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
        "prts.key": first.key,
    }
    files = {item.path for item in store.list_artifacts(run.info.run_id)}
    assert files == {"config.json", "report.json", "plots"}
    assert (outputs / "mlartifacts" / "quickstart" / run.info.run_id / "artifacts" / "plots" / "curve.txt").exists()
    # a stage without parents records what it made itself: raw recordings are the first dataset
    (recorded,) = run_of(outputs, first).inputs.dataset_inputs
    assert first.content_digest.startswith("sha256:" + recorded.dataset.digest)
    assert Path(json.loads(recorded.dataset.source)["uri"]) == first.folder(outputs).resolve()


def test_the_page_says_what_was_run_and_leads_to_dagster(outputs, monkeypatch):
    caller = {"dagster.run_id": "0123456789", "dagster.asset_key": "quickstart/sft"}
    work = toy_work(outputs, key="note", overrides=("sft.train.steps=10", "seed=8"), partition="door", caller=caller)
    with stage_run(work) as tracked:
        pass
    tags = client(outputs).get_run(tracked.run_id).data.tags
    assert tags["prts.overrides"] == "--set sft.train.steps=10 --set seed=8" and tags["prts.partition"] == "door"
    said = tags["mlflow.note.content"]
    assert "[Dagster run 01234567](http://127.0.0.1:3000/runs/0123456789), asset `quickstart/sft`" in said
    assert "**sft** of recipe `quickstart`" in said and "dataset `door`" in said and "`note`" in said
    assert "`--set sft.train.steps=10 --set seed=8`" in said
    monkeypatch.setenv("PRTS_DAGSTER_PORT", "3211")
    with stage_run(toy_work(outputs, key="note2", caller=caller)) as tracked:
        pass
    assert "http://127.0.0.1:3211/runs/" in client(outputs).get_run(tracked.run_id).data.tags["mlflow.note.content"]


@pytest.mark.parametrize("datasets", [0, 1, 18, 40])
def test_lineage_is_never_cut(outputs, datasets):
    inputs = {
        f"{stage}:a_dataset_with_a_long_name_{number}": toy_manifest(stage, f"{number:020x}", f"dataset_{number}")
        for stage in ("convert", "validate", "stats")
        for number in range(datasets)
    }
    with stage_run(toy_work(outputs, inputs, key=f"mix{datasets}")) as tracked:
        pass
    run = client(outputs).get_run(tracked.run_id)
    assert parents_of(run.data.tags) == {role: (m.key, m.digest) for role, m in inputs.items()}
    assert len(run.inputs.dataset_inputs) == len(inputs)
    assert "fault" not in tracked.links()


def test_tags_of_any_length_are_read_as_they_were_written():
    for length in (2, TAG_CHARS - 1, TAG_CHARS, TAG_CHARS + 1, 3 * TAG_CHARS):
        tags = split_tag("prts.parents", json.dumps({"a": "x" * (length - 9)}))
        assert all(len(text) <= TAG_CHARS for text in tags.values())
        assert parents_of(tags) == {"a": ("", "x" * (length - 9))}
    assert parents_of({"prts.parents": '{"convert":"sha256:12"}'}) == {"convert": ("", "sha256:12")}  # before keys
    assert parents_of({}) == {}


def test_links_lead_to_the_run_and_a_finished_stage_opens_none(plan, outputs):
    stage = toy_stage("linked", write_and_report)
    made = run_toys(plan, outputs, stage)
    links = provenance(outputs, made["linked"])["mlflow"]
    uri = tracking_uri(outputs)
    assert links["url"] == run_url(uri, links["experiment_id"], links["run_id"]) and uri.startswith("sqlite:///")
    assert all(isinstance(value, str) for value in links.values()) and "fault" not in links
    before = len(client(outputs).search_runs([links["experiment_id"]]))
    assert run_toys(plan, outputs, stage) == made
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
        run_toys(plan, outputs, stage)
    failed = kept_run(outputs, "flaky")
    run_id = failed.info.run_id
    assert failed.info.status == "FAILED" and "gripper fell off" in failed.data.tags["prts.error"]

    broken[0] = False
    again = run_of(outputs, run_toys(plan, outputs, stage)["flaky"])
    assert again.info.run_id == run_id and again.info.status == "FINISHED"
    assert again.data.tags["prts.attempts"] == "2" and "prts.error" not in again.data.tags
    steps = [point.step for point in client(outputs).get_metric_history(run_id, "loss")]
    assert steps == [1, 2, 3]  # steps 1 and 2 came twice and stand once


def test_an_attempt_with_another_way_of_working_goes_on_in_the_same_run(outputs):
    """MLflow refuses to change a parameter: fields that are no part of the key keep their first value there."""
    work = toy_work(outputs, key="workers")
    with pytest.raises(StageError), stage_run(work) as first:
        raise StageError("cut")
    with stage_run(replace(work, config=ToyConfig(rate=0.75))) as second:
        pass
    assert second.run_id == first.run_id and "fault" not in second.links()
    run = client(outputs).get_run(first.run_id)
    assert run.data.params["rate"] == "0.5"
    config = outputs / "mlartifacts" / "quickstart" / first.run_id / "artifacts" / "config.json"
    assert read_json(config)["rate"] == 0.75


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.fixtures.toy_stages import run_toys, toy_stage
from prts_core.config.load import load_plan
from prts_core.store.stage import StageResult

def slow(config, inputs, context):
    done = context.work / "done"
    for step in range(1, 4):
        context.log({{"loss": 1.0 / step}}, step)
    if not done.exists():
        done.touch()
        time.sleep(60)
    (context.output / "x").write_text("x")
    return StageResult({{"final": 1.0}})

run_toys(load_plan(Path({config!r})), Path({outputs!r}), toy_stage("slow", slow))
"""


def test_a_killed_stage_goes_on_in_the_same_run(plan, outputs):
    code = KILLED.format(root=str(Path(__file__).parents[2]), config=str(plan.path), outputs=str(outputs))
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(2400):  # importing MLflow on a busy machine takes its time
            if list(outputs.glob("store/slow/*/work/done")) and list(outputs.glob("store/slow/*/work/mlflow.json")):
                break
            assert process.poll() is None
            threading.Event().wait(0.05)
        run_id = kept_run(outputs, "slow").info.run_id
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert client(outputs).get_run(run_id).info.status == "RUNNING"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=150)
    (path,) = outputs.glob("store/slow/*/provenance.json")
    assert read_json(path)["mlflow"]["run_id"] == run_id
    assert client(outputs).get_run(run_id).info.status == "FINISHED"
    assert [p.step for p in client(outputs).get_metric_history(run_id, "loss")] == [1, 2, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("Stopped on request")])
def test_an_interrupted_stage_ends_killed(outputs, error):
    with pytest.raises(type(error)), stage_run(toy_work(outputs, key=type(error).__name__)) as tracked:
        raise error
    assert client(outputs).get_run(tracked.run_id).info.status == "KILLED"


def test_a_skipped_stage_leaves_no_run(outputs):
    with pytest.raises(Skipped), stage_run(toy_work(outputs, key="skipped")) as tracked:
        raise Skipped("not here")
    assert client(outputs).get_run(tracked.run_id).info.lifecycle_stage == "deleted"


def test_stages_in_many_threads_share_the_store(plan, outputs):
    recipes = [replace(plan, recipe=replace(plan.recipe, name=f"thread-{i}", seed=i)) for i in range(4)]
    made = {}

    def work(one):
        stage = replace(toy_stage("threaded", write_and_report), seeded=True)
        made[one.recipe.name] = run_toys(one, outputs, stage)["threaded"]

    threads = [threading.Thread(target=work, args=(one,)) for one in recipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    for recipe, manifest in made.items():
        run = run_of(outputs, manifest)
        assert run.info.status == "FINISHED" and run.data.metrics["success_rate"] == 0.9
        assert client(outputs).get_experiment(run.info.experiment_id).name == recipe


# ---- servers that fail -----------------------------------------------------------------------------------------------
@pytest.fixture
def impatient(monkeypatch):
    """The same waits, shorter."""
    monkeypatch.setattr(runs, "OPEN_SECONDS", 1.0)
    monkeypatch.setattr(outbox, "GRACE_S", 0.5)
    monkeypatch.setattr(outbox.Outbox.flush, "__defaults__", (2.0,))
    monkeypatch.setattr(runs, "PATIENCE_S", 2.0)


@pytest.mark.parametrize("error", ["mlflow", "boto"])
def test_a_server_that_fails_half_way_costs_no_work_and_is_told(outputs, caplog, impatient, error):
    from mlflow.exceptions import MlflowException

    class BotoCoreError(Exception):
        """What an artifact store raises is of no family that we know."""

    fault = MlflowException("connection lost") if error == "mlflow" else BotoCoreError("connection lost")
    work = toy_work(outputs, key=f"cut-off-{error}")
    output = work.folder / "output"
    with caplog.at_level(logging.WARNING, "prts.tracking"), stage_run(work) as tracked:
        tracked.store = Deaf(tracked.store, fault)
        (output / "report.json").write_text("{}")
        tracked.log({"loss": 1.0}, 1)
        tracked.finish(toy_manifest("sft", work.key), StageResult({"rate": 1.0}, {}, ("report.json",)), output)
        fault = tracked.links()["fault"]
    assert sum("does not take" in record.message for record in caplog.records) == 1
    assert "connection lost" in fault and "metrics" in fault and "artifact report.json" in fault


class Deaf:
    """A real client whose server has gone: every call raises what MLflow raises then."""

    def __init__(self, store, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            raise self._error

        return call


@pytest.fixture
def hanging():
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("state", ["hanging", "dead"])
def test_a_server_that_is_away_stalls_nothing_and_is_told(
    plan, tmp_path, monkeypatch, caplog, impatient, hanging, state
):
    import mlflow  # noqa: F401 - importing it is no part of the time that is measured

    monkeypatch.setenv("MLFLOW_TRACKING_URI", hanging if state == "hanging" else closed_port())
    calls = []

    def train(config, inputs, context):
        for step in range(2000):
            begun = time.monotonic()
            context.log({"loss": 1.0, "lr": 0.1}, step)
            calls.append(time.monotonic() - begun)
        return write_and_report(config, inputs, context)

    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, "prts.tracking"):
        made = run_toys(plan, tmp_path, toy_stage("away", train))["away"]
    assert time.monotonic() - begun < 60
    assert sorted(calls)[-20] < 0.05 and max(calls) < 5.0  # a busy machine may take the processor away for a moment
    links = provenance(tmp_path, made)["mlflow"]
    assert links["fault"].startswith("run: ") and "run_id" not in links and links["git.sha"]
    if state == "dead":
        assert [r for r in caplog.records if "does not take this run's run" in r.message]
    time.sleep(0.2)
    assert not list(tmp_path.glob("store/*/*/work"))  # nothing is written behind the stage's back


def test_a_store_that_cannot_be_opened_is_one_clear_error(plan, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a database, and long enough to be taken for a damaged one " * 20)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{blocked}")
    with pytest.raises(StageError, match=r"MLflow store cannot be opened.*MLFLOW_TRACKING_URI"):
        run_toys(plan, tmp_path / "outputs", toy_stage("blocked", write_and_report))


def test_without_mlflow_the_stage_runs_and_says_so_once(plan, tmp_path, monkeypatch, caplog):
    def missing():
        raise MissingExtraError("This needs the package 'mlflow'", cure=install_extra("pipeline"))

    monkeypatch.setattr(runs, "mlflow_module", missing)
    monkeypatch.setattr(runs, "_said_missing", threading.Event())
    stages = [toy_stage(name, write_and_report) for name in ("one", "two")]
    with caplog.at_level(logging.WARNING, "prts.tracking"):
        made = run_toys(plan, tmp_path, *stages)
    assert [r.message for r in caplog.records if "not tracked" in r.message] == [caplog.records[0].message]
    assert provenance(tmp_path, made["two"])["mlflow"] == {}


def test_flatten_names_every_leaf():
    plain = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}], "f": {}, "odd key!": True}
    assert flatten(plain) == {
        "a.b": "1",
        "a.c": "[1, 2]",
        "d.0.e": "null",
        "f": "{}",
        "odd key_": "true",
    }


def test_importing_the_tracker_does_not_import_mlflow():
    code = "import sys, prts_core.tracking.runs, prts_core.tracking.store; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
