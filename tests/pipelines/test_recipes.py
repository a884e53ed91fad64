"""Several recipes on one page: keys, dependencies and partitions from declarations; launchpad; sources."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
import yaml

from assets.launchpad import set_texts
from assets.recipes import recipe_pages
from pipelines.definitions import build
from prts_core.config.load import load_plan
from prts_core.io.errors import ConfigError
from prts_core.stages import chain, declarations
from prts_core.store.views import viewed
from tests.pipelines.test_assets import materialised

ROOT = Path(__file__).resolve().parents[2]
TWO = "configs/quickstart.yaml,configs/smoke.yaml"


@pytest.fixture(autouse=True)
def without_dvc(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRTS_ENV", "test")


@pytest.fixture
def two(project, monkeypatch) -> dg.Definitions:
    monkeypatch.setenv("PRTS_RECIPE", TWO)
    return build(recipe_pages(), project.outputs, "inline")


def specs(defs: dg.Definitions) -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}


def edit(path: Path, **changes) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


# ---- several recipes ---------------------------------------------------------------------------------------------
def test_two_recipes_stand_side_by_side(two):
    found = specs(two)
    for recipe in ("quickstart", "smoke"):
        stages = {stage for stage, _ in declarations.steps(load_plan(Path(f"configs/{recipe}.yaml")))}
        made = {name.split("/")[1] for name in found if name.startswith(f"{recipe}/")}
        assert stages | {"register", "regression"} == made - {"source"}
    assert {"quickstart_chain", "smoke_chain"} <= {job.name for job in two.resolve_all_job_defs()}
    dg.Definitions.validate_loadable(two)


def test_the_second_recipe_runs_without_touching_the_first(project, run_job, monkeypatch):
    monkeypatch.setenv("PRTS_RECIPE", TWO)
    assert run_job("data", "metaworld").success
    first = viewed(project.outputs, "quickstart", "stats", "metaworld")
    result = run_job("data", "metaworld_smoke", recipe="smoke")
    assert result.success
    assert {e.asset_key.path[0] for e in result.get_asset_materialization_events()} == {"smoke"}
    assert viewed(project.outputs, "quickstart", "stats", "metaworld") == first
    assert viewed(project.outputs, "smoke", "stats", "metaworld_smoke") is not None


def test_two_recipes_share_equal_work(project, run_job, monkeypatch):
    text = (project.folder / "configs/quickstart.yaml").read_text()
    (project.folder / "configs/other.yaml").write_text(text.replace("name: quickstart", "name: other", 1))
    monkeypatch.setenv("PRTS_RECIPE", "configs/quickstart.yaml,configs/other.yaml")
    assert run_job("data", "metaworld").success
    project.calls()
    again = run_job("data", "metaworld", recipe="other")
    assert again.success and project.calls() == []
    assert viewed(project.outputs, "other", "stats", "metaworld") == viewed(
        project.outputs, "quickstart", "stats", "metaworld"
    )


def test_two_recipes_of_one_name_are_refused(project, monkeypatch):
    monkeypatch.setenv("PRTS_RECIPE", "configs/smoke.yaml,configs/smoke.yaml")
    with pytest.raises(ConfigError, match="Two recipes are called 'smoke'"):
        recipe_pages()


def test_the_definitions_load_in_seconds(project, monkeypatch):
    monkeypatch.setenv("PRTS_RECIPE", TWO)
    recipe_pages()  # what is imported late
    begun = time.monotonic()
    build(recipe_pages(), project.outputs).resolve_asset_graph()
    assert time.monotonic() - begun < 3


# ---- dependencies ------------------------------------------------------------------------------------------------
def upstream(defs: dg.Definitions, child: str, parent: str, partition: str | None) -> set[str]:
    """Partitions of `parent` that Dagster thinks `child` depends on."""
    graph = defs.resolve_asset_graph()
    recipe = child.split("/")[0]
    with dg.DagsterInstance.ephemeral() as instance:
        from dagster._core.definitions.partitions.context import partition_loading_context

        with partition_loading_context(dynamic_partitions_store=instance):
            found = graph.get_parents_partitions(dg.AssetKey(child.split("/")), partition).parent_partitions
    return {p.partition_key for p in found if p.asset_key == dg.AssetKey([recipe, parent])}


def test_partitions_are_mapped_as_the_declarations_say(project, two):
    assert upstream(two, "quickstart/sft", "convert", "g1_bottle") == {"g1_bottle"}
    assert upstream(two, "quickstart/pretrain", "stats", None) == {"metaworld"}  # the mixture, not every dataset
    assert upstream(two, "quickstart/package", "sft", None) == {"metaworld"}
    assert upstream(two, "quickstart/collect", "source", "g1_bottle") == {"g1_bottle"}
    assert upstream(two, "quickstart/collect", "source", "metaworld") == set()
    edit(project.folder / "configs/quickstart.yaml", pretrain={"mixture": {"metaworld": 1.0, "g1_bottle": 2.0}})
    whole = build(recipe_pages(), project.outputs)
    assert upstream(whole, "quickstart/pretrain", "stats", None) == {"metaworld", "g1_bottle"}


def test_a_recipe_that_starts_from_a_checkpoint_has_no_pretrain(project, monkeypatch):
    edit(project.folder / "configs/smoke.yaml", sft={"checkpoint": "somewhere"})
    monkeypatch.setenv("PRTS_RECIPE", "configs/smoke.yaml")
    found = specs(build(recipe_pages(), project.outputs))
    assert "smoke/pretrain" not in found
    assert "smoke/pretrain" not in {d.asset_key.to_user_string() for d in found["smoke/sft"].deps}


# ---- whose policy goes on ----------------------------------------------------------------------------------------
def edges(defs: dg.Definitions, child: str) -> set[str]:
    return {dep.asset_key.path[-1] for dep in specs(defs)[child].deps}


def test_a_recipe_shows_reinforcement_learning_where_it_asks_for_it(project, run_job, monkeypatch):
    smoke = project.folder / "configs/smoke.yaml"
    edit(smoke, policy="rl", rl={"iterations": 2})
    monkeypatch.setenv("PRTS_RECIPE", TWO)
    defs = build(recipe_pages(), project.outputs, "inline")
    assert "quickstart/rl" not in specs(defs) and "smoke/subtask" not in specs(defs)
    assert specs(defs)["smoke/rl"].code_version == str(declarations.STAGES["rl"].version)
    assert edges(defs, "smoke/rl") == {"convert", "sft"}
    assert edges(defs, "smoke/benchmark") == {"convert", "sft", "rl"}
    assert edges(defs, "smoke/package") == {"rl", "benchmark", "value"}
    assert upstream(defs, "smoke/rl", "sft", None) == {"metaworld_smoke"}
    dg.Definitions.validate_loadable(defs)
    result = run_job("chain", "metaworld_smoke", recipe="smoke")
    assert result.success and "rl -" in project.calls() and "rl" in materialised(result)


def test_a_recipe_whose_reinforcement_learning_starts_elsewhere_fine_tunes_nothing(project, monkeypatch):
    edit(project.folder / "configs/smoke.yaml", policy="rl", rl={"checkpoint": "somewhere"})
    monkeypatch.setenv("PRTS_RECIPE", "configs/smoke.yaml")
    defs = build(recipe_pages(), project.outputs, "inline")
    assert not {"smoke/pretrain", "smoke/sft", "smoke/subtask"} & specs(defs).keys()
    assert edges(defs, "smoke/rl") == {"convert"} and edges(defs, "smoke/benchmark") == {"convert", "rl"}
    dg.Definitions.validate_loadable(defs)


def test_the_subtask_policy_goes_on_where_the_recipe_says_so(project, monkeypatch):
    edit(project.folder / "configs/smoke.yaml", policy="subtask")
    monkeypatch.setenv("PRTS_RECIPE", "configs/smoke.yaml")
    defs = build(recipe_pages(), project.outputs, "inline")
    assert edges(defs, "smoke/package") == {"subtask", "benchmark", "value"}


# ---- the launchpad -----------------------------------------------------------------------------------------------
def changed(**config) -> dict:
    from pipelines.terminal import QUIET

    return {"run_config": {**QUIET, "resources": {"plan_quickstart": {"config": config}}}}


def test_changed_values_make_a_result_of_their_own(project, run_job):
    assert run_job("chain", "metaworld").success
    before = viewed(project.outputs, "quickstart", "sft", "metaworld")
    project.calls()
    result = run_job("chain", "metaworld", **changed(sft={"train": {"steps": 30, "learning_rate": 2}}, seed=8))
    assert result.success and "sft metaworld" in project.calls()
    shown = materialised(result)["sft"]
    texts = ["seed=8", "sft.train.steps=30", "sft.train.learning_rate=2.0"]
    assert all(text in shown.metadata["changed values"].value for text in texts)
    assert before is not None and shown.tags["dagster/data_version"] != before.digest
    assert viewed(project.outputs, "quickstart", "sft", "metaworld") == before
    plan = load_plan(Path("configs/quickstart.yaml"), ["sft.train.steps=30", "sft.train.learning_rate=2", "seed=8"])
    made = chain.finished("sft", plan, "metaworld", project.outputs)
    assert made.config["train"]["steps"] == 30 and made.seed == 8


def test_what_load_plan_refuses_is_the_failures_text(project, run_job):
    result = run_job("data", "metaworld", **changed(sft={"train": {"steps": -5}}))
    (failed,) = result.get_step_failure_events()
    said = failed.step_failure_data.user_failure_data.description
    assert "steps" in said and "-5" in said and "Cure:" in said
    assert project.calls() == []


def test_a_field_that_is_none_is_refused_before_the_run(project, run_job):
    with pytest.raises(dg.DagsterInvalidConfigError, match="stepz"):
        run_job("data", "metaworld", **changed(sft={"train": {"stepz": 5}}))
    with pytest.raises(dg.DagsterInvalidConfigError, match="steps"):
        run_job("data", "metaworld", **changed(sft={"train": {"steps": "many"}}))


def test_every_value_of_a_recipe_can_be_typed(project):
    """All fields of the recipe, written as run configuration, come back as they were."""
    from dataclasses import asdict

    plan = load_plan(Path("configs/quickstart.yaml"))
    (page,) = recipe_pages()
    plain = json.loads(json.dumps(asdict(plan.recipe)))
    for fixed in ("name", "datasets", "deploy", "policy"):
        plain.pop(fixed)
    schema = build([page], project.outputs).resolve_job_def("quickstart_data").resource_defs[page.resource]
    from dagster._config import validate_config

    told = validate_config(schema.config_schema.config_type, plain)
    assert told.success, [error.message for error in told.errors or []]
    assert load_plan(plan.path, set_texts(plain)).recipe == plan.recipe


def test_the_launchpad_as_it_opens_changes_nothing(project, run_job):
    """The page sends back every value that it shows."""
    (page,) = recipe_pages()
    schema = build([page], project.outputs).resolve_job_def("quickstart_data").resource_defs[page.resource]
    shown = schema.config_schema.default_value
    assert shown["sft"]["train"]["steps"] == 1900 and "name" not in shown
    made = materialised(run_job("data", "metaworld", **changed(**shown)))
    assert "changed values" not in made["stats"].metadata
    assert viewed(project.outputs, "quickstart", "stats", "metaworld") is not None


def test_set_texts_are_yaml():
    config = {"a": {"b": 1.0e-5, "c": [1, 2]}, "d": "no", "e": None, "f": {}}
    assert set_texts(config) == ["a.b=1.0e-05", "a.c=[1, 2]", "d='no'", "e=null", "f={}"]


# ---- external sources --------------------------------------------------------------------------------------------
def test_a_changed_file_makes_that_dataset_stale_and_no_other(project, monkeypatch):
    from dagster._core.definitions.data_version import CachingStaleStatusResolver

    (page,) = recipe_pages()
    defs = build([page], project.outputs, "inline")
    with dg.DagsterInstance.ephemeral() as instance:

        def run(job: str, partition: str | None = None) -> dg.ExecuteInProcessResult:
            done = defs.resolve_job_def(f"quickstart_{job}").execute_in_process(
                instance=instance, partition_key=partition
            )
            assert done.success
            return done

        def stale(dataset: str) -> str:
            from dagster._core.definitions.partitions.context import partition_loading_context
            from dagster._core.loader import LoadingContextForTest

            with partition_loading_context(dynamic_partitions_store=instance):
                resolver = CachingStaleStatusResolver(
                    instance, defs.resolve_asset_graph(), LoadingContextForTest(instance)
                )
                return resolver.get_status(page.key("collect"), dataset).value

        seen = run("look_at_sources").get_asset_observation_events()
        (observed,) = [event.asset_observation_data.asset_observation for event in seen]
        assert (observed.partition, observed.metadata["files"].value) == ("g1_bottle", 1)
        run("data", "g1_bottle")
        run("data", "metaworld")
        assert (stale("g1_bottle"), stale("metaworld")) == ("FRESH", "FRESH")
        (project.folder.parent / "shared/data/g1_bottle/more.txt").write_text("two\n")
        run("look_at_sources")
        assert (stale("g1_bottle"), stale("metaworld")) == ("STALE", "FRESH")
        run("data", "g1_bottle")
        assert stale("g1_bottle") == "FRESH"


def test_data_follows_its_source_once_that_is_switched_on(project):
    (page,) = recipe_pages()
    defs = build([page], project.outputs, "inline")
    with dg.DagsterInstance.ephemeral() as instance:
        for job, partition in (("look_at_sources", None), ("data", "g1_bottle"), ("data", "metaworld")):
            run = defs.resolve_job_def(f"quickstart_{job}").execute_in_process
            assert run(instance=instance, partition_key=partition).success
        first = dg.evaluate_automation_conditions(defs, instance)
        (project.folder.parent / "shared/data/g1_bottle/more.txt").write_text("two\n")
        assert defs.resolve_job_def("quickstart_look_at_sources").execute_in_process(instance=instance).success
        then = dg.evaluate_automation_conditions(defs, instance, cursor=first.cursor)
        asked = {
            (key.path[-1], partition)
            for key in (page.key(stage.name) for stage in page.stages)
            for partition in then.get_requested_partitions(key)
        }
        assert asked == {(stage, "g1_bottle") for stage in ("collect", "convert", "validate", "stats")}


def test_an_absent_source_is_observed_as_nothing(project, monkeypatch):
    monkeypatch.setenv("PRTS_SHARED", str(project.folder / "nowhere"))
    defs = build(recipe_pages(), project.outputs, "inline")
    with dg.DagsterInstance.ephemeral() as instance:
        done = defs.resolve_job_def("quickstart_look_at_sources").execute_in_process(instance=instance)
        assert done.success and done.get_asset_observation_events() == []


# ---- nothing starts by itself ------------------------------------------------------------------------------------
def test_nothing_runs_before_somebody_switches_it_on(two, monkeypatch):
    for schedule in two.schedules or []:
        assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED, schedule.name
        assert schedule.execution_timezone == "UTC"
    for sensor in two.sensors or []:
        assert sensor.default_status == dg.DefaultSensorStatus.STOPPED, sensor.name


def test_the_child_process_imports_no_dagster():
    code = (
        "import sys, assets.pipes_main\n"
        "sys.exit('dagster' in sys.modules or any(m.startswith('dagster.') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
