"""Assets against a stub chain: what Dagster is told, what stops, what is skipped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from prts_core.config.load import load_plan
from prts_core.data.validation.report import Finding, ValidationFailed, ValidationReport
from prts_core.io.errors import StageError
from prts_core.io.files import read_json, write_json
from prts_core.stages import declarations
from prts_core.store.manifest import Manifest
from prts_core.store.views import view_folder, viewed
from prts_core.tracking.store import UI_FILE
from tests.pipelines import stub_chain


@pytest.fixture(autouse=True)
def without_dvc(project, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC has tests of its own."""
    monkeypatch.setenv("PRTS_ENV", "test")


def materialised(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetMaterialization]:
    """Stage -> its materialisation."""
    return {e.asset_key.path[-1]: e.materialization for e in result.get_asset_materialization_events()}


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {e.check_name: e for e in result.get_asset_check_evaluations()}


def rows(value: dg.TableMetadataValue) -> list[dict]:
    return [dict(record.data) for record in value.records]


def present(project, stage: str, partition: str | None) -> Manifest:
    manifest = viewed(project.outputs, "quickstart", stage, partition)
    assert manifest is not None
    return manifest


def test_the_whole_chain_runs_once_in_order(project, run_job):
    assert run_job("chain", "metaworld").success
    called = [line.split()[0] for line in project.calls()]
    plan = load_plan(Path("configs/quickstart.yaml"))
    assert sorted(called) == sorted({stage for stage, _ in declarations.steps(plan)} | {"register"})
    for at, stage in enumerate(called[:-1]):  # siblings may swap
        parents = {p.stage for p in declarations.STAGES[stage].parents(plan, None)}
        assert parents <= set(called[:at]), stage
    assert run_job("chain", "metaworld").success
    assert project.calls() == ["register -"]  # an operation: it looks at the registry each time


def test_data_versions_are_the_manifests_digests(project, run_job):
    result = run_job("chain", "metaworld")
    for stage, event in materialised(result).items():
        if stage == "register":
            continue
        partition = "metaworld" if declarations.STAGES[stage].partitioned else None
        manifest = present(project, stage, partition)
        assert event.asset_key.path == ["quickstart", stage]
        assert event.tags["dagster/data_version"] == manifest.digest
        assert event.tags["dagster/code_version"] == str(declarations.STAGES[stage].version)
        assert event.partition == partition
        shown = event.metadata
        assert shown["manifest_digest"].value == manifest.digest and shown["key"].value == manifest.key
        assert shown["rows"].value == 3.0 and shown["bytes"].value > 0
        assert Path(shown["path"].value) == manifest.folder(project.outputs).resolve()


def test_the_plot_is_shown_inline_and_small(project, run_job):
    shown = materialised(run_job("chain", "metaworld"))["sft"].metadata["plot"].value
    assert shown.startswith("![loss](data:image/png;base64,")
    assert len(shown) < 20_000


def test_a_converted_dataset_shows_its_rows_and_columns(project, run_job):
    shown = materialised(run_job("data", "metaworld"))["convert"].metadata
    assert shown["dagster/row_count"].value == 40 and shown["episodes"].value == 2
    columns = {column.name: column for column in shown["dagster/column_schema"].value.columns}
    state = columns["observation.state"]
    assert (state.type, state.description) == ("float32", "[3]: x, y, gripper")
    assert columns["observation.images.top"].type == "video"


def test_a_result_of_other_code_says_so(project, run_job, monkeypatch):
    assert "made by other code" not in materialised(run_job("data", "metaworld"))["stats"].metadata
    monkeypatch.setattr("assets.metadata.code_digest", lambda stage: "sha256:another")
    again = materialised(run_job("data", "metaworld"))
    assert "source has changed" in again["stats"].metadata["made by other code"].value
    assert project.calls() == [f"{stage} metaworld" for stage in ("collect", "convert", "validate", "stats")]


def test_the_registered_model_is_named(project, run_job):
    shown = materialised(run_job("chain", "metaworld"))["register"].metadata
    assert shown["model_uri"].value == "models:/prts-stub/1"
    assert shown["aliases"].value == "@challenger, @champion"


def test_the_registered_version_becomes_a_partition_of_the_regression(project):
    from assets.recipes import recipe_pages
    from pipelines.definitions import build

    (page,) = recipe_pages()
    with dg.DagsterInstance.ephemeral() as instance:
        job = build([page], project.outputs, "inline").resolve_job_def("quickstart_chain")
        assert job.execute_in_process(instance=instance, partition_key="metaworld").success
        assert instance.get_dynamic_partitions(str(page.versions.name)) == ["1"]


def test_the_import_of_another_dataset_touches_nothing_else(project, run_job):
    assert run_job("chain", "metaworld").success
    project.calls()
    result = run_job("import_dataset", "g1_bottle")
    assert result.success
    assert [f"{stage} g1_bottle" for stage in ("collect", "convert", "validate", "stats", "sft")] == project.calls()


def test_sft_without_pretraining_says_what_to_run(project, run_job):
    result = run_job("import_dataset", "g1_bottle")
    assert not result.success
    (failed,) = result.get_step_failure_events()
    said = failed.step_failure_data.user_failure_data
    assert failed.step_key == "quickstart__sft"
    assert "run `prts pretrain` first" in said.description
    assert said.metadata["cure"].value == "run `prts pretrain` first"


def test_an_absent_optional_dataset_is_skipped_without_a_trace_of_success(project, run_job, monkeypatch):
    assert run_job("chain", "metaworld").success
    project.calls()
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    result = run_job("import_dataset", "g1_bottle")
    assert result.success
    assert materialised(result) == {} and checks(result) == {} and project.calls() == []
    view = view_folder(project.outputs, "quickstart", "collect", "g1_bottle")
    note = read_json(view / "manifest.json")
    assert note == {"skipped": "Dataset 'g1_bottle' is not on this machine"}
    shutil.rmtree(view)
    project.run("prts", "collect", "--dataset", "g1_bottle", "--allow-skip")
    assert read_json(view / "manifest.json") == note
    (observed,) = result.get_asset_observation_events()
    seen = observed.asset_observation_data.asset_observation
    assert seen.asset_key.path == ["quickstart", "collect"] and seen.partition == "g1_bottle"
    assert "g1_bottle" in seen.metadata["skipped"].value
    # the data comes: the same job now does the work
    monkeypatch.setenv("PRTS_SHARED", str(project.folder.parent / "shared"))
    assert set(materialised(run_job("import_dataset", "g1_bottle"))) == {
        "collect",
        "convert",
        "validate",
        "stats",
        "sft",
    }


def test_an_absent_dataset_that_is_not_optional_is_a_failure(project, run_job, monkeypatch):
    path = project.folder / "configs/datasets/g1_bottle.yaml"
    path.write_text(path.read_text().replace("optional: true", "optional: false"))
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    result = run_job("data", "g1_bottle")
    assert not result.success
    (failed,) = result.get_step_failure_events()
    assert "is not on this machine" in failed.step_failure_data.user_failure_data.description


def break_validation(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    def run(config, inputs, context):
        report = ValidationReport(config.dataset, list(findings))
        raise ValidationFailed(report, context.output / "report.json")

    monkeypatch.setitem(declarations.STAGES, "validate", replace(declarations.STAGES["validate"], run=run))


def test_a_failed_validation_stops_what_follows_and_shows_a_table(project, run_job, monkeypatch):
    break_validation(
        monkeypatch,
        Finding("table values", "data/chunk-000/episode_000003.parquet", "NaN", "a finite number", row=17),
        Finding("videos", "videos/x.mp4", "41 frames", "42 frames", severity="warning"),
        Finding("jumps", "data/chunk-000/episode_000003.parquet", "2 m in a row", "less", severity="warning"),
    )
    result = run_job("chain", "metaworld")
    assert not result.success
    assert set(materialised(result)) == {"collect", "convert"}
    shown = checks(result)
    assert {name: (check.passed, check.blocking) for name, check in shown.items()} == {
        "tables": (False, True),
        "metadata": (True, True),
        "laws": (True, True),
        "content": (True, True),
        "physics": (False, False),
        "statistics": (True, True),
        "video": (True, True),
    }
    assert shown["physics"].severity == dg.AssetCheckSeverity.WARN
    (row,) = rows(shown["tables"].metadata["failures"])
    assert (row["check"], row["row"], row["found"]) == ("table values", 17, "NaN")
    assert shown["video"].metadata["warnings"].value == 1
    assert [line.split()[0] for line in project.calls()] == ["collect", "convert"]


def test_a_strange_dataset_is_a_warning_and_nothing_stops(project, run_job, monkeypatch):
    def run(config, inputs, context):
        jump = Finding("jumps", "data/chunk-000/episode_000003.parquet", "2 m in a row", "less", severity="warning")
        ValidationReport(config.dataset, [jump]).save(context.output)
        return stub_chain.StageResult()

    monkeypatch.setitem(declarations.STAGES, "validate", replace(declarations.STAGES["validate"], run=run))
    result = run_job("data", "metaworld")
    assert result.success and "stats" in materialised(result)
    assert [name for name, check in checks(result).items() if not check.passed] == ["physics"]


def test_a_datasets_verdict_hides_no_others(project, monkeypatch):
    """Checks of the partitioned asset are partitioned."""
    from assets.recipes import recipe_pages
    from pipelines.definitions import build

    with dg.DagsterInstance.ephemeral() as instance:

        def run(partition: str) -> bool:
            job = build(recipe_pages(), project.outputs, "inline").resolve_job_def("quickstart_data")
            return job.execute_in_process(instance=instance, partition_key=partition, raise_on_error=False).success

        assert run("metaworld")
        break_validation(monkeypatch, Finding("totals", "meta/info.json", "9", "10"))
        assert not run("g1_bottle")
        key = dg.AssetCheckKey(dg.AssetKey(["quickstart", "validate"]), "laws")
        found = instance.event_log_storage.get_asset_check_partition_info([key])
        assert {one.partition_key: one.latest_execution_status.value for one in found} == {
            "metaworld": "SUCCEEDED",
            "g1_bottle": "FAILED",
        }


def test_passed_checks_are_recorded(project, run_job):
    shown = checks(run_job("chain", "metaworld"))
    assert {name for name, check in shown.items() if check.passed and check.blocking} == {
        "tables",
        "metadata",
        "laws",
        "content",
        "statistics",
        "video",
    }
    rate = shown["success_rate_above_floor"]
    assert rate.passed and not rate.blocking
    assert rate.metadata["lower"].value == pytest.approx(0.764, abs=0.001)
    (row,) = rows(rate.metadata["tasks"])
    assert row == {
        "task": "faucet-open",
        "successes": 19,
        "episodes": 20,
        "95 % from": 0.764,
        "95 % to": 0.991,
        "step limit": 84,
    }


def test_a_low_success_rate_warns_and_stops_nothing(project, run_job, monkeypatch):
    few = {"faucet-open": stub_chain.TASKS["faucet-open"] | {"successes": 16}}
    monkeypatch.setitem(stub_chain.REPORTS, "benchmark", stub_chain.REPORTS["benchmark"] | {"tasks": few})
    result = run_job("chain", "metaworld")
    assert result.success
    rate = checks(result)["success_rate_above_floor"]
    assert not rate.passed
    assert rate.severity == dg.AssetCheckSeverity.WARN


def test_flagged_demonstrations_are_listed_as_a_warning(project, run_job, monkeypatch):
    result = run_job("chain", "metaworld")
    assert result.success
    check = checks(result)["demonstrations_rise"]
    assert not check.passed and check.severity == dg.AssetCheckSeverity.WARN and not check.blocking
    (row,) = rows(check.metadata["demonstrations"])
    assert (row["episode"], row["flag"], row["score"]) == (7, "reversed", -0.4)


def test_a_sound_ranking_passes(project, run_job, monkeypatch):
    monkeypatch.setitem(stub_chain.RANKING, "verdicts", stub_chain.RANKING["verdicts"][1:])
    check = checks(run_job("chain", "metaworld"))["demonstrations_rise"]
    assert check.passed and check.metadata["ranked"].value == 1 and "demonstrations" not in check.metadata


def test_a_bug_is_not_tried_again(project, run_job, monkeypatch):
    monkeypatch.setenv("PRTS_STUB_BREAK", "stats")
    result = run_job("chain", "metaworld")
    assert not result.success
    assert project.calls().count("stats metaworld") == 1
    (failed,) = result.get_step_failure_events()
    assert "a bug in the stage's code" in failed.step_failure_data.user_failure_data.description


def test_a_prts_error_becomes_the_failures_text(project, run_job, monkeypatch):
    def run(config, inputs, context):
        raise StageError("The simulator has no display", file="egl", cure="install libegl1")

    monkeypatch.setitem(declarations.STAGES, "collect", replace(declarations.STAGES["collect"], run=run))
    (failed,) = run_job("chain", "metaworld").get_step_failure_events()
    assert failed.step_failure_data.user_failure_data.description == (
        "The simulator has no display. File: egl. Cure: install libegl1."
    )


@pytest.mark.parametrize("project", ["tracked"], indirect=True)
def test_the_mlflow_run_and_the_dagster_run_know_each_other(project, run_job):
    from mlflow import MlflowClient

    result = run_job("chain", "metaworld")
    assert result.success
    shown = materialised(result)["sft"].metadata
    assert shown["mlflow_run"].value.endswith(shown["mlflow_run_id"].value)
    store = MlflowClient(f"sqlite:///{(project.outputs / 'mlflow.db').resolve()}")
    tags = store.get_run(shown["mlflow_run_id"].value).data.tags
    assert tags["dagster.run_id"] == result.run_id
    assert tags["dagster.asset_key"] == "quickstart/sft"
    assert tags["dagster.partition"] == "metaworld"
    assert tags["dagster.code_version"] == str(declarations.STAGES["sft"].version)
    # a finished result's link leads to where MLflow's page is now
    write_json(project.outputs / UI_FILE, {"mlflow": "http://127.0.0.1:5099"})
    again = materialised(run_job("chain", "metaworld"))["sft"].metadata
    assert again["mlflow_run"].value == shown["mlflow_run"].value.replace(":5000/", ":5099/")
