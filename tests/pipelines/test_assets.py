"""Assets against a stub chain: what Dagster is told, what stops, what is skipped."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from prts_core.config.load import load_plan
from prts_core.data.validation.report import Finding, ValidationFailed, ValidationReport
from prts_core.errors import StageError
from prts_core.stages import chain
from prts_core.stages.base import load_manifest
from tests.pipelines import stub_chain


@pytest.fixture(autouse=True)
def without_dvc(project, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC has tests of its own."""
    monkeypatch.setenv("PRTS_ENV", "test")


def materialised(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetMaterialization]:
    return {e.asset_key.to_user_string(): e.materialization for e in result.get_asset_materialization_events()}


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {e.check_name: e for e in result.get_asset_check_evaluations()}


def test_the_whole_chain_runs_once_in_order(project, run_job):
    assert run_job("demo", "metaworld").success
    called = [line.split()[0] for line in project.calls()]
    assert sorted(called) == sorted(chain.STAGES)
    plan = load_plan(Path("configs/quickstart.yaml"))
    for at, stage in enumerate(called):  # siblings may swap
        parents = {p.stage for p in chain.STAGES[stage].parents(plan, None)}
        assert parents <= set(called[:at]), stage
    assert run_job("demo", "metaworld").success
    assert project.calls() == []


def test_data_versions_are_the_manifests_digests(project, run_job):
    result = run_job("demo", "metaworld")
    for stage, event in materialised(result).items():
        partition = "metaworld" if chain.STAGES[stage].partitioned else None
        manifest = load_manifest(project.outputs, stage, "quickstart", partition)
        assert event.tags["dagster/data_version"] == manifest.digest
        assert event.metadata["manifest_digest"].value == manifest.digest
        assert event.partition == partition
        assert event.metadata["rows"].value == 3.0


def test_the_plot_is_shown_inline_and_small(project, run_job):
    shown = materialised(run_job("demo", "metaworld"))["sft"].metadata["plot"].value
    assert shown.startswith("![loss](data:image/png;base64,")
    assert len(shown) < 20_000


def test_the_registered_model_is_named(project, run_job):
    shown = materialised(run_job("demo", "metaworld"))["register"].metadata
    assert shown["model_uri"].value == "models:/prts-stub/1"
    assert shown["aliases"].value == "@challenger, @champion"


def test_the_registered_version_becomes_a_partition_of_the_regression(project):
    from assets.partitions import VERSIONS
    from pipelines.definitions import definitions

    with dg.DagsterInstance.ephemeral() as instance:
        job = definitions().resolve_job_def("demo")
        assert job.execute_in_process(instance=instance, partition_key="metaworld").success
        assert instance.get_dynamic_partitions(str(VERSIONS.name)) == ["1"]


def test_the_import_of_another_dataset_touches_nothing_else(project, run_job):
    assert run_job("demo", "metaworld").success
    project.calls()
    result = run_job("import_dataset", "g1_bottle")
    assert result.success
    assert [f"{stage} g1_bottle" for stage in ("collect", "convert", "validate", "stats", "sft")] == project.calls()


def test_sft_without_pretraining_says_what_to_run(project, run_job):
    result = run_job("import_dataset", "g1_bottle")
    assert not result.success
    (failed,) = result.get_step_failure_events()
    said = failed.step_failure_data.user_failure_data
    assert failed.step_key == "sft"
    assert "run `prts pretrain` first" in said.description
    assert said.metadata["cure"].value == "run `prts pretrain` first"


def test_absent_reference_data_skips_the_partition_with_its_reason(project, run_job, monkeypatch):
    assert run_job("demo", "metaworld").success
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    result = run_job("import_dataset", "g1_bottle")
    assert result.success
    assert materialised(result) == {}
    for stage in ("collect", "convert", "validate", "stats", "sft"):
        manifest = load_manifest(project.outputs, stage, "quickstart", "g1_bottle")
        assert manifest.skipped and "folder is absent" in manifest.skipped
    # the data comes: the same job now does the work
    monkeypatch.setenv("PRTS_SHARED", str(project.folder.parent / "shared"))
    assert set(materialised(run_job("import_dataset", "g1_bottle"))) == {
        "collect",
        "convert",
        "validate",
        "stats",
        "sft",
    }


def break_validation(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    def run(config, inputs, context):
        report = ValidationReport(config.dataset, list(findings))
        raise ValidationFailed(report, context.output / "report.json")

    from dataclasses import replace

    monkeypatch.setitem(chain.STAGES, "validate", replace(chain.STAGES["validate"], run=run))


def test_a_failed_validation_stops_what_follows_and_shows_a_table(project, run_job, monkeypatch):
    break_validation(
        monkeypatch,
        Finding("table values", "data/chunk-000/episode_000003.parquet", "NaN", "a finite number", row=17),
        Finding("videos", "videos/x.mp4", "41 frames", "42 frames", severity="warning"),
    )
    result = run_job("demo", "metaworld")
    assert not result.success
    assert set(materialised(result)) == {"collect", "convert"}
    shown = checks(result)
    assert {name: check.passed for name, check in shown.items()} == {
        "tables": False, "metadata": True, "laws": True, "content": True, "physics": True, "statistics": True,
        "video": True,
    }  # fmt: skip
    assert "| error | table values | data/chunk-000/episode_000003.parquet | 17 | NaN |" in (
        shown["tables"].metadata["failures"].value
    )
    assert shown["video"].metadata["warnings"].value == 1
    assert [line.split()[0] for line in project.calls()] == ["collect", "convert"]


def test_passed_checks_are_recorded(project, run_job):
    shown = checks(run_job("demo", "metaworld"))
    assert {name for name, check in shown.items() if check.passed and check.blocking} == {
        "tables", "metadata", "laws", "content", "physics", "statistics", "video",
    }  # fmt: skip
    rate = shown["success_rate_above_floor"]
    assert rate.passed and not rate.blocking
    assert rate.metadata["lower"].value == pytest.approx(0.764, abs=0.001)
    assert "| faucet-open | 19/20 | 0.76 - 0.99 | 84 |" in rate.metadata["tasks"].value


def test_a_low_success_rate_warns_and_stops_nothing(project, run_job, monkeypatch):
    few = {"faucet-open": stub_chain.TASKS["faucet-open"] | {"successes": 16}}
    monkeypatch.setitem(stub_chain.REPORTS, "benchmark", stub_chain.REPORTS["benchmark"] | {"tasks": few})
    result = run_job("demo", "metaworld")
    assert result.success
    rate = checks(result)["success_rate_above_floor"]
    assert not rate.passed
    assert rate.severity == dg.AssetCheckSeverity.WARN


def test_flagged_demonstrations_are_listed_as_a_warning(project, run_job, monkeypatch):
    result = run_job("demo", "metaworld")
    assert result.success
    check = checks(result)["demonstrations_rise"]
    assert not check.passed and not check.blocking and check.severity == dg.AssetCheckSeverity.WARN
    assert check.description == "1 of 2 demonstrations are flagged: episodes 7"
    assert "| 7 | open the faucet | reversed | falls by 1.42 nats, peers rise by 1.10 | -0.40 |" in (
        check.metadata["demonstrations"].value
    )


def test_good_demonstrations_pass(project, run_job, monkeypatch):
    monkeypatch.setitem(stub_chain.RANKING, "verdicts", stub_chain.RANKING["verdicts"][1:])
    check = checks(run_job("demo", "metaworld"))["demonstrations_rise"]
    assert check.passed and check.metadata["ranked"].value == 1 and "demonstrations" not in check.metadata


def test_a_bug_is_tried_again_only_where_it_may_help(project, run_job, monkeypatch):
    monkeypatch.setenv("PRTS_STUB_BREAK", "stats")
    assert not run_job("demo", "metaworld").success
    assert project.calls().count("stats metaworld") == 1


def test_a_prts_error_becomes_the_failures_text(project, run_job, monkeypatch):
    from dataclasses import replace

    def run(config, inputs, context):
        raise StageError("The simulator has no display", file="egl", cure="install libegl1")

    monkeypatch.setitem(chain.STAGES, "collect", replace(chain.STAGES["collect"], run=run))
    (failed,) = run_job("demo", "metaworld").get_step_failure_events()
    assert failed.step_failure_data.user_failure_data.description == (
        "The simulator has no display. File: egl. Cure: install libegl1."
    )


def test_the_definitions_load_and_are_sound(project):
    from pipelines.definitions import definitions

    dg.Definitions.validate_loadable(definitions())


@pytest.mark.parametrize("project", ["tracked"], indirect=True)
def test_the_mlflow_run_and_the_dagster_run_know_each_other(project, run_job):
    from mlflow import MlflowClient

    result = run_job("demo", "metaworld")
    assert result.success
    shown = materialised(result)["sft"].metadata
    assert shown["mlflow_run"].value.endswith(shown["mlflow_run_id"].value)
    store = MlflowClient(f"sqlite:///{(project.outputs / 'mlflow.db').resolve()}")
    tags = store.get_run(shown["mlflow_run_id"].value).data.tags
    assert tags["dagster.run_id"] == result.run_id
    assert tags["dagster.asset_key"] == "sft"
    assert tags["dagster.partition"] == "metaworld"
    assert tags["dagster.code_version"]
