"""The nightly job against a real registry: quiet while the champion holds, loud when it has fallen behind."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import dagster as dg
import pytest
from dagster._utils.schedules import schedule_execution_time_iterator

from assets.launchpad import plan_resource
from assets.recipes import SUITE, VERSION, RecipePage
from assets.regression import CHECK, NIGHT_TAG, regression_asset
from pipelines.definitions import build
from pipelines.jobs import jobs
from pipelines.nightly import nightly_regression
from pipelines.sensors import alarm_sensor
from prts_core.config.load import load_plan
from prts_core.delivery import protocol, regression
from prts_core.delivery.gate import policy_episodes
from prts_core.delivery.suite_results import result_of
from prts_core.io.errors import ConfigError
from prts_core.io.files import write_json
from prts_core.rollout import benchmark
from prts_core.rollout.published_results import published
from tests.fixtures.toy_package import PROTOCOL, make, named, outcomes, register, toy_report

ROOT = Path(__file__).resolve().parents[2]
KEY = dg.AssetKey(["quickstart", "regression"])
RECIPE = ROOT / "configs" / "quickstart.yaml"
WITH_SUITE = ["regression.suites=[{suite: libero_object, episodes: 120}]"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A registry whose champion `prts-quickstart` succeeded in 115 of its 120 episodes."""
    folder = tmp_path_factory.mktemp("outputs")
    plan = named(load_plan(RECIPE), "prts-quickstart")
    make(plan, folder, "w", outcomes(115))
    register(plan, folder)
    return folder


class Episodes:
    protocol_digest, keys = PROTOCOL, range(120)


@pytest.fixture
def tonight(monkeypatch: pytest.MonkeyPatch):
    """Let tonight's benchmark find so many successes; returns what it was asked to run."""
    asked = {}

    def set_(successes: int, first_seed: int = 90_000) -> dict:
        def run(config, places, conditions):
            asked.update(config=config, places=places, conditions=conditions)
            places.output.mkdir(parents=True, exist_ok=True)
            outcomes(successes, first_seed=first_seed).write_parquet(places.output / "episodes.parquet")
            return toy_report()

        monkeypatch.setattr(benchmark, "benchmark_policy", run)
        monkeypatch.setattr(protocol, "planned", lambda plan, name, chunk_length: Episodes)
        return asked

    return set_


def page(overrides: list[str] | None = None) -> RecipePage:
    return RecipePage(load_plan(RECIPE, overrides))


def night(
    outputs: Path, instance: dg.DagsterInstance, suite: str = "benchmark", overrides: list[str] | None = None
) -> dg.ExecuteInProcessResult:
    mine = page(overrides)
    instance.add_dynamic_partitions(str(mine.versions.name), ["1"])
    return dg.materialize(
        [regression_asset(mine)],
        partition_key=dg.MultiPartitionKey({SUITE: suite, VERSION: "1"}),
        instance=instance,
        tags={NIGHT_TAG: "2026-11-21"},
        resources={mine.resource: plan_resource(mine, outputs, overrides or [])},
        raise_on_error=False,
    )


def check_of(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    (found,) = result.get_asset_check_evaluations()
    assert found.check_name == CHECK
    return found


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def test_an_unchanged_champion_passes_and_shows_its_history(outputs, tonight, instance):
    asked = tonight(115)
    result = night(outputs, instance)
    assert result.success and check_of(result).passed and check_of(result).partition == "benchmark|1"
    assert asked["conditions"] == ("policy",) and asked["config"].failures_wanted == 0
    assert (asked["places"].policy / "model.safetensors").read_text() == "w"  # the registered one
    assert asked["places"].output.name.startswith("2026-11-21-")  # a second attempt of the night resumes the first
    (event,) = result.get_asset_materialization_events()
    shown = event.materialization.metadata
    assert shown["history"].value.startswith("![history](data:image/")
    assert shown["result"].value.endswith("115/120") and shown["assets"].value == "the suite's own"
    assert "/#/experiments/" in shown["mlflow_run"].value


def test_a_regression_turns_the_check_red_and_leaves_an_alarm(outputs, tonight, instance, monkeypatch, tmp_path):
    tonight(80)
    result = night(outputs, instance)
    assert not result.success
    red = check_of(result)
    assert not red.passed and red.severity == dg.AssetCheckSeverity.ERROR
    assert (
        red.description.startswith("benchmark, version 1: challenger - champion = -0.292")
        and "worse than the champion" in red.description
    )
    failure_event = next(e for e in result.all_events if e.event_type_value == "PIPELINE_FAILURE")
    context = dg.build_run_status_sensor_context(
        sensor_name="alarm_on_failed_runs",
        dagster_event=failure_event,
        dagster_instance=instance,
        dagster_run=result.dagster_run,
    ).for_run_failure()
    alarm_sensor(tmp_path)(context)
    told = json.loads((tmp_path / "alarms" / f"{result.run_id}.json").read_text())
    assert told["reason"] == red.description and told["partition"] == "benchmark|1"


def test_other_episodes_cannot_be_compared_and_are_no_pass(outputs, tonight, instance):
    tonight(115, first_seed=1)
    night(outputs, instance)
    warned = check_of(instance_result := night(outputs, instance))
    assert instance_result.success and not warned.passed and warned.severity == dg.AssetCheckSeverity.WARN
    assert "did not run the same episodes of benchmark" in warned.description


def test_a_suite_of_the_recipe_is_a_partition_and_says_stand_in_assets(outputs, tonight, instance, monkeypatch):
    """Every place a result on stand-in assets appears says so; published numbers keep away from it. What is red on one
    suite stays red there when another passes."""
    tonight(80)
    assert not night(outputs, instance, overrides=WITH_SUITE).success
    tasks = [
        {"name": f"t{i}", "instruction": "", "initial_states": 50, "max_steps": 280, "perturbation": {}}
        for i in range(10)
    ]
    protocol = {
        "suite": "libero_object",
        "tasks": tasks,
        "settle_steps": 10,
        "perturbation": {},
        "standins": "22 files",
    }

    def measure(plan, name, package, outputs, folder, say, dtype):
        assert name == "libero_object"
        folder.mkdir(parents=True, exist_ok=True)
        outcomes(100).write_parquet(folder / "episodes.parquet")
        row = {"n": 12, "successes": 10, "wilson95": [0.5, 0.9]}
        report = {
            "suite": "libero_object",
            "successes": 100,
            "n": 120,
            "labels": ["22 files"],
            "protocol": protocol,
            "protocol_digest": "sha256:" + "0" * 64,
            "tasks": {"t0": row},
            "published": published(protocol, 100, 120),
        }
        write_json(folder / "report.json", report)
        return result_of(report, policy_episodes(folder / "episodes.parquet"))

    monkeypatch.setattr(regression, "measure_version", measure)
    result = night(outputs, instance, "libero_object", WITH_SUITE)
    assert result.success and check_of(result).passed and "first result" in check_of(result).description
    (event,) = result.get_asset_materialization_events()
    shown = event.materialization.metadata
    assert shown["assets"].value == "stand-ins: 22 files" and "(stand-in assets)" in shown["result"].value
    cells = [str(cell) for record in shown["published"].records for cell in record.data.values()]
    assert any("this policy (stand-in assets)" in cell for cell in cells) and "83.3" in cells and "PRTS" not in cells
    assert "ours ran on stand-in assets" in shown["not comparable"].value
    (task,) = shown["tasks"].records
    assert list(task.data.values()) == ["t0", 10, 12, 0.5, 0.9]
    checks = instance.event_log_storage.get_asset_check_partition_info([dg.AssetCheckKey(KEY, CHECK)])
    assert {one.partition_key: one.latest_execution_status.value for one in checks} == {
        "benchmark|1": "FAILED",
        "libero_object|1": "SUCCEEDED",
    }


def test_the_schedule_asks_for_the_champion_and_is_silent_without_one(tmp_path, outputs):
    with dg.instance_for_test() as instance:  # on disk: a schedule opens it by its reference

        def evaluate(folder: Path, overrides: list[str]):
            at = datetime(2026, 11, 21, 2, 30)
            context = dg.build_schedule_context(instance=instance, scheduled_execution_time=at)
            mine = page(overrides)
            return nightly_regression(mine, jobs(mine), folder)(context)

        skipped = evaluate(tmp_path / "empty", [])
        assert isinstance(skipped, dg.SkipReason) and "no champion yet" in str(skipped.skip_message)
        asked = evaluate(outputs, ["regression.suites=[{suite: libero_goal}]"])
        assert [str(request.partition_key) for request in asked] == ["benchmark|1", "libero_goal|1"]
        assert asked[0].tags[NIGHT_TAG] == "2026-11-21" and asked[0].run_key.startswith("2026-11-21/")
        assert instance.get_dynamic_partitions(str(page().versions.name)) == ["1"]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, instance: dg.DagsterInstance):
    """Berlin's nightly run, switched on; the state that Dagster's freshness daemon records at a time of there."""
    from dagster._core.loader import LoadingContextForTest
    from dagster._core.test_utils import freeze_time
    from dagster._daemon.freshness import FreshnessDaemon

    monkeypatch.setenv("PRTS_NIGHTLY", "on")
    monkeypatch.setenv("PRTS_TIMEZONE", "Europe/Berlin")
    graph = build([page()], tmp_path).resolve_asset_graph()

    def state_at(time: datetime, *, measured: bool = False) -> str:
        context = LoadingContextForTest(instance)
        context.asset_graph = graph
        with freeze_time(time):
            if measured:
                instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition="benchmark|1"))
            list(FreshnessDaemon().run_iteration(SimpleNamespace(create_request_context=lambda: context)))
        return instance.get_freshness_state_records([KEY])[KEY].freshness_state.value

    return state_at


def berlin(month: int, day: int, hour: int, minute: int = 0) -> datetime:
    return datetime(2026, month, day, hour, minute, tzinfo=ZoneInfo("Europe/Berlin"))


def test_a_night_that_brings_nothing_is_overdue_at_noon(watched):
    assert watched(berlin(11, 20, 13)) == "UNKNOWN"  # nothing is registered yet
    assert watched(berlin(11, 21, 4), measured=True) == "PASS"
    assert watched(berlin(11, 22, 12, 29)) == "PASS"
    assert watched(berlin(11, 22, 12, 31)) == "FAIL"
    assert watched(berlin(11, 22, 14), measured=True) == "PASS"
    assert watched(berlin(11, 23, 12, 31)) == "FAIL"  # what was made in the afternoon is not the next night's


@pytest.mark.parametrize(("month", "day"), [(3, 29), (10, 25)])
def test_a_night_in_which_clocks_change_is_in_time(watched, tmp_path, month, day):
    """Whatever the schedule's own hour is: a result a minute after the night began counts for that day."""
    mine = page()
    own = nightly_regression(mine, jobs(mine), tmp_path)
    midnight = berlin(month, day, 0).timestamp()
    ticks = schedule_execution_time_iterator(midnight, own.cron_schedule, own.execution_timezone, ascending=True)
    begun = next(tick for tick in ticks if tick.timestamp() > midnight)
    assert begun.date() == berlin(month, day, 0).date()
    assert watched(begun + timedelta(minutes=1), measured=True) == "PASS"
    assert watched(berlin(month, day, 23)) == "PASS"
    assert watched(berlin(month, day + 1, 23)) == "FAIL"


def test_the_night_is_watched_only_where_it_is_switched_on(tmp_path, monkeypatch):
    def policy_and_status() -> tuple[bool, dg.DefaultScheduleStatus]:
        made, mine = build([page()], tmp_path), page()
        watch = made.resolve_asset_graph().get(KEY).freshness_policy
        return watch is not None, nightly_regression(mine, jobs(mine), tmp_path).default_status

    monkeypatch.delenv("PRTS_NIGHTLY", raising=False)
    assert policy_and_status() == (False, dg.DefaultScheduleStatus.STOPPED)
    monkeypatch.setenv("PRTS_NIGHTLY", "on")
    assert policy_and_status() == (True, dg.DefaultScheduleStatus.RUNNING)
    monkeypatch.setenv("PRTS_NIGHTLY", "yes")
    with pytest.raises(ConfigError, match="PRTS_NIGHTLY"):
        policy_and_status()
