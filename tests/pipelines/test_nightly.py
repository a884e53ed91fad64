"""The nightly job against a real registry: quiet while the champion holds, loud when it has fallen behind."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest

from assets.resources import PlanResource
from pipelines.nightly import every_night, nightly_benchmark
from prts_core.config.load import load_plan
from prts_core.evaluation import benchmark
from tests.tracking.toy_package import make, named, outcomes, register

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A registry whose champion `prts-quickstart` succeeded in 115 of its 120 episodes."""
    folder = tmp_path_factory.mktemp("outputs")
    plan = named(load_plan(RECIPE), "prts-quickstart")
    make(plan, folder, "w", outcomes(115))
    register(plan, folder)
    return folder


@pytest.fixture
def tonight(monkeypatch: pytest.MonkeyPatch):
    """Let tonight's benchmark find so many successes; returns what it was asked to run."""
    asked = {}

    def set_(successes: int, first_seed: int = 90_000) -> dict:
        def run(config, places, conditions):
            asked.update(config=config, places=places, conditions=conditions)
            places.output.mkdir(parents=True, exist_ok=True)
            outcomes(successes, first_seed=first_seed).write_parquet(places.output / "episodes.parquet")

        monkeypatch.setattr(benchmark, "benchmark_policy", run)
        return asked

    return set_


def night(outputs: Path) -> tuple[dg.ExecuteInProcessResult, str]:
    with dg.DagsterInstance.ephemeral() as instance:
        result = nightly_benchmark.execute_in_process(
            instance=instance,
            raise_on_error=False,
            resources={"plan": PlanResource(recipe=str(RECIPE), outputs=str(outputs))},
        )
    for event in result.filter_events(lambda e: e.is_step_failure):
        return result, str(event.step_failure_data.user_failure_data.description)
    return result, ""


def test_an_unchanged_champion_passes(outputs, tonight):
    asked = tonight(115)
    result, _ = night(outputs)
    assert result.success
    verdict = result.output_for_node("benchmark_champion")
    assert verdict["alarm"] is False and verdict["n_pairs"] == 120
    assert asked["conditions"] == ("policy",)
    assert (asked["places"].policy / "model.safetensors").read_text() == "w"  # the registered one
    assert asked["config"].failures_wanted == 0


def test_a_regression_is_a_failure_with_the_gates_words(outputs, tonight):
    tonight(80)
    result, said = night(outputs)
    assert not result.success
    assert said.startswith("The champion has regressed: challenger - champion = -0.292")
    assert "worse than the champion" in said


def test_other_episodes_cannot_be_compared_and_fail_too(outputs, tonight):
    tonight(115, first_seed=1)
    result, said = night(outputs)
    assert not result.success
    assert "did not run the same episodes" in said and "Cure:" in said


def test_without_a_champion_the_night_is_skipped(tmp_path, outputs):
    def evaluate(folder: Path):
        context = dg.build_schedule_context(resources={"plan": PlanResource(recipe=str(RECIPE), outputs=str(folder))})
        return every_night(context)

    skipped = evaluate(tmp_path / "empty")
    assert isinstance(skipped, dg.SkipReason)
    assert "champion does not exist yet" in str(skipped.skip_message)
    asked = evaluate(outputs)
    assert isinstance(asked, dg.RunRequest)


def test_the_alarm_leaves_a_file(outputs, tonight, monkeypatch, tmp_path):
    from pipelines.sensors import alarm

    monkeypatch.setenv("PRTS_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("PRTS_RECIPE", str(RECIPE))
    tonight(80)
    with dg.DagsterInstance.ephemeral() as instance:
        result = nightly_benchmark.execute_in_process(
            instance=instance,
            raise_on_error=False,
            resources={"plan": PlanResource(recipe=str(RECIPE), outputs=str(outputs))},
        )
        failure_event = next(e for e in result.all_events if e.event_type_value == "PIPELINE_FAILURE")
        context = dg.build_run_status_sensor_context(
            sensor_name="alarm", dagster_event=failure_event, dagster_instance=instance, dagster_run=result.dagster_run
        ).for_run_failure()
        alarm(context)
    told = json.loads((tmp_path / "alarms" / f"{result.run_id}.json").read_text())
    assert told["job"] == "nightly_benchmark"
    assert told["reason"].startswith("The champion has regressed")
