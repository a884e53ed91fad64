"""`make demo`'s program over the stub chain: one report, going on after a kill, nothing to do the third time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import dagster as dg
import pytest

from pipelines import demo, report
from prts_core.config.load import load_plan
from prts_core.data.validation.report import Finding
from prts_core.io.errors import DataError, StageError
from prts_core.io.files import read_json
from prts_core.stages import chain, declarations
from tests.pipelines import stub_chain
from tests.pipelines.test_assets import break_validation

DATA = ("collect", "convert", "validate", "stats")


@pytest.fixture(autouse=True)
def without_dvc(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRTS_ENV", "test")


def runs(project) -> list[dg.DagsterRun]:
    with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
        return list(reversed(instance.get_runs()))


def test_the_demo_makes_everything_once_and_reports_it(project, capfd):
    assert demo.main([]) == 0
    assert len(project.calls()) == 16
    made = read_json(project.outputs / "demo" / "report.json")
    for name in report.RATES:
        assert made[name] == stub_chain.REPORTS["benchmark"][name]
    assert made["value"] == stub_chain.REPORTS["value"]
    assert made["tasks"] == stub_chain.TASKS
    plan = load_plan(project.folder / "configs/quickstart.yaml")
    assert list(made["seconds"]) == sorted({stage for stage, _ in declarations.steps(plan)})
    assert made["seconds_total"] == pytest.approx(sum(made["seconds"].values()), abs=0.01)
    assert made["model_uri"] == "models:/prts-stub/1"
    package = chain.finished("package", plan, None, project.outputs)
    assert made["package_digest"] == package.content_digest
    assert set(made["dataset_digests"]) == {"metaworld", "g1_bottle"}
    assert [(run.job_name, run.status) for run in runs(project)] == [
        ("quickstart_chain", dg.DagsterRunStatus.SUCCESS),
        ("quickstart_import_dataset", dg.DagsterRunStatus.SUCCESS),
    ]
    shown, log = capfd.readouterr()
    assert all(text in shown for text in ("faucet-open", "19/20", "models:/prts-stub/1", "are stand-ins"))
    assert "http://127.0.0.1:3000" in shown and "http://127.0.0.1:5000" in shown
    # one line a stage, and none of Dagster's own
    lines = [line.split()[1:3] for line in shown.splitlines() if line.startswith("done")]
    assert lines[:4] == [[stage, "metaworld"] for stage in DATA] and lines[4][0] == "pretrain"
    assert len(lines) == 16
    assert "DEBUG" not in shown + log and "STEP_START" not in shown + log


def test_the_third_time_nothing_happens_in_no_time(project, capsys):
    assert demo.main([]) == 0
    project.calls()
    capsys.readouterr()
    stamp = (project.outputs / "demo" / "report.json").stat().st_mtime_ns
    begun = time.monotonic()
    assert demo.main([]) == 0
    assert time.monotonic() - begun < 5
    assert project.calls() == []
    assert "nothing to do" in capsys.readouterr().out
    assert len(runs(project)) == 2
    assert (project.outputs / "demo" / "report.json").stat().st_mtime_ns == stamp


def test_a_damaged_output_is_found_and_made_again(project, capsys):
    assert demo.main([]) == 0
    project.calls()
    plan = load_plan(project.folder / "configs/quickstart.yaml")
    content = chain.finished("value", plan, None, project.outputs).folder(project.outputs) / "data" / "content.txt"
    content.chmod(0o644)
    content.write_text("vandal")
    assert demo.main([]) == 0
    assert project.calls() == ["value -", "register -"]  # equal work, equal digest: what follows stays
    shown = capsys.readouterr().out
    assert "nothing to do" not in shown


def test_a_fault_is_one_paragraph_and_the_next_demo_goes_on(project, capsys, monkeypatch):
    real = declarations.STAGES["stats"]

    def run(config, inputs, context):
        raise DataError("A parquet file is truncated", file="data/x.parquet", cure="restore it")

    monkeypatch.setitem(declarations.STAGES, "stats", replace(real, run=run))
    assert demo.main([]) == 1
    shown = capsys.readouterr()
    assert (
        "error: Job 'quickstart_chain' stopped: stats failed: A parquet file is truncated. File: data/x.parquet. Cure: "
        "restore it." in shown.err
    )
    assert "Traceback" not in shown.err
    assert shown.out.splitlines()[-1].split() == ["failed", "stats", "metaworld"]
    monkeypatch.setitem(declarations.STAGES, "stats", real)
    project.calls()
    assert demo.main([]) == 0
    assert "collect metaworld" not in project.calls()


def test_a_bug_in_a_stage_names_the_stage(project, capsys, monkeypatch):
    monkeypatch.setenv("PRTS_STUB_BREAK", "collect")
    assert demo.main([]) == 1
    said = capsys.readouterr().err.rsplit("error:", 1)[1]
    assert "collect failed" in said and "a bug in the stage's code" in said


def test_a_failed_check_names_the_stage(project, capsys, monkeypatch):
    break_validation(monkeypatch, Finding("totals", "meta/info.json", "total_frames: 9", "10"))
    assert demo.main([]) == 1
    said = capsys.readouterr().err.rsplit("error:", 1)[1]
    assert "validate" in said and "total_frames: 9" in said and "meta/info.json" in said


def test_absent_optional_data_is_told_and_no_reason_to_run_again(project, capsys, monkeypatch):
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    assert demo.main([]) == 0
    shown = capsys.readouterr().out
    assert any(line.startswith("skipped collect") and "g1_bottle" in line for line in shown.splitlines())
    made = read_json(project.outputs / "demo" / "report.json")
    assert "g1_bottle" in made["skipped"]["collect:g1_bottle"]
    project.calls()
    assert demo.main([]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert project.calls() == []
    monkeypatch.setenv("PRTS_SHARED", str(project.folder.parent / "shared"))
    assert demo.main([]) == 0
    assert next(line for line in project.calls() if "g1_bottle" in line) == "collect g1_bottle"
    assert read_json(project.outputs / "demo" / "report.json")["skipped"] == {}


def test_an_absent_dataset_that_the_policy_needs_is_told_as_the_cause(project, capsys, monkeypatch):
    recipe = project.folder / "configs/quickstart.yaml"
    text = recipe.read_text().replace("deploy: metaworld", "deploy: g1_bottle")
    recipe.write_text(text.replace("mixture: {metaworld: 1.0}", "mixture: {g1_bottle: 1.0}"))
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    assert demo.main([]) == 1
    said = capsys.readouterr().err
    assert "'g1_bottle' needs data that is not here" in said and "has not run yet" not in said
    assert project.calls() == []


def test_the_demo_of_a_policy_that_learned_by_reinforcement(project, capfd):
    path = project.folder / "configs/quickstart.yaml"
    path.write_text(path.read_text() + "policy: rl\n")
    assert demo.main([]) == 0
    called = [line.split()[0] for line in project.calls()]
    assert "rl" in called and "subtask" not in called
    made = read_json(project.outputs / "demo" / "report.json")
    assert "rl" in made["seconds"] and set(made["subtask"].values()) == {None}
    assert "rl, seconds" in capfd.readouterr()[0]


def test_a_mixture_of_datasets_is_imported_before_pretraining(project):
    recipe = project.folder / "configs/quickstart.yaml"
    text = recipe.read_text()
    assert "mixture: {metaworld: 1.0}" in text
    recipe.write_text(text.replace("mixture: {metaworld: 1.0}", "mixture: {metaworld: 1.0, g1_bottle: 1.0}"))
    assert demo.main([]) == 0
    called = project.calls()
    assert called.index("stats g1_bottle") < called.index("pretrain -")
    assert len(called) == 16


def demo_script(project, then: str = "") -> list[str]:
    """`make demo` of the stub chain as a program of its own."""
    script = project.folder / "demo_of_stubs.py"
    script.write_text(
        "import os, signal, sys\nfrom dataclasses import replace\nfrom tests.pipelines import stub_chain\n"
        "from prts_core.store.run_stage import untracked\nimport prts_core.tracking.runs as runs\n"
        "runs.stage_run = untracked\nstages = stub_chain.declarations.STAGES\n"
        "stages.update(stub_chain.stubbed_stages())\n"
        f"stub_chain.chain.register = stub_chain.stub_register\n{then}\n"
        "from pipelines import demo\nsys.exit(demo.main([]))\n"
    )
    return [sys.executable, str(script)]


def test_a_killed_demo_is_taken_up_and_its_run_is_closed(project, capsys):
    """SIGKILL while `sft` works; the run must not stand as running for ever, nor hold its place in the pool."""
    die = "stages['sft'] = replace(stages['sft'], run=lambda *given: os.kill(os.getpid(), signal.SIGKILL))"
    died = subprocess.run(demo_script(project, die), cwd=project.folder, capture_output=True, text=True, timeout=120)
    assert died.returncode == -9, died.stderr
    assert [run.status for run in runs(project)] == [dg.DagsterRunStatus.STARTED]
    assert project.calls()[-1] == "pretrain -"
    assert demo.main([]) == 0
    assert project.calls()[0] == "sft metaworld"
    assert [run.status for run in runs(project)] == [
        dg.DagsterRunStatus.FAILURE,
        dg.DagsterRunStatus.SUCCESS,
        dg.DagsterRunStatus.SUCCESS,
    ]


def test_ctrl_c_leaves_a_checkpoint_and_the_next_demo_goes_on(project):
    slow = project.calls_file.with_name("calls.txt.slow")
    slow.write_text("sft")
    log = project.folder / "demo.log"
    running = subprocess.Popen(
        demo_script(project),
        cwd=project.folder,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    give_up = time.monotonic() + 120
    while not (found := list(project.outputs.glob("store/sft/*/work/checkpoint.txt"))):
        assert running.poll() is None and time.monotonic() < give_up
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130, log.read_text()
    shown = log.read_text()
    assert "stopped sft        metaworld" in shown
    assert "interrupted; `make demo` goes on from here" in shown and "Traceback" not in shown
    assert found[0].read_text() == "on request\n"
    slow.unlink()
    project.calls()
    assert demo.main([]) == 0
    assert project.calls()[:2] == ["sft metaworld", "sft resumed"]


def test_finished_asks_for_every_stage(project):
    plan = load_plan(project.folder / "configs/quickstart.yaml")
    assert not demo.finished(plan, project.outputs)
    for stage, partition in declarations.steps(plan):
        chain.run(stage, plan, partition, project.outputs)
    assert not demo.finished(plan, project.outputs)
    chain.register(plan, project.outputs)
    assert demo.finished(plan, project.outputs)
    assert not demo.finished(load_plan(plan.path, ["seed=8"]), project.outputs)
    with pytest.raises(StageError, match="has not run yet"):
        report.write(load_plan(plan.path, ["name=other", "seed=9"]), project.outputs)
