"""The nightly regression test: the champion on the episodes it was promoted on, judged by the same gate.

A policy does not change overnight; code, drivers and packages do. It knows neither simulator nor statistics.
"""

from dataclasses import replace
from typing import Any

import dagster as dg

from assets.common import failure
from assets.resources import PlanResource
from prts_core.errors import PrtsError, StageError
from prts_core.evaluation import gate
from prts_core.stages import chain


@dg.op(
    description="Benchmark models:/<name>@champion again and compare it with its own recorded episodes, pair by pair."
)
def benchmark_champion(context: dg.OpExecutionContext, plan: PlanResource) -> dict[str, Any]:
    """The gate's verdict as plain data. Raises dg.Failure with the verdict's words on an alarm."""
    try:
        verdict = rerun_champion(plan, context.run.run_id)
    except PrtsError as err:
        raise failure(err) from err
    shown = {name: value for name, value in verdict.to_json().items() if value is not None}
    if verdict.alarm:
        raise dg.Failure(
            description=f"The champion has regressed: {verdict.reason}", metadata=shown, allow_retries=False
        )
    context.log.info(verdict.reason)
    context.add_output_metadata(shown)
    return verdict.to_json()


def rerun_champion(plan: PlanResource, run: str) -> gate.Verdict:
    """Run the benchmark on the champion's package into `<outputs>/nightly/<run>/` and ask the gate."""
    from prts_core.evaluation.benchmark import Places, benchmark_policy
    from prts_core.tracking import registry

    loaded = plan.load()
    register = loaded.recipe.register
    found = registry.champion_episodes(plan.folder, register.model_name)
    if found is None:
        raise StageError(
            f"Model {register.model_name!r} has no champion to look after",
            expected=f"models:/{register.model_name}@champion",
            cure="run `make demo`; the gate promotes its first version above the recipe's floor",
        )
    version, then = found
    output = plan.folder / "nightly" / run
    package = registry.version_files(plan.folder, version, registry.PACKAGE)
    config = replace(
        chain.STAGES["benchmark"].config(loaded, None), failures_wanted=0
    )  # no controls, no extra failures
    places = Places(policy=package, dataset=None, early=None, work=output / "work", output=output)
    benchmark_policy(config, places, conditions=("policy",))
    tonight = gate.policy_episodes(output / "episodes.parquet")
    return gate.decide(tonight, then, margin=register.margin, floor=register.floor)


@dg.job(description="Does the champion still do what it did when it was promoted? Red when it does not.")
def nightly_benchmark() -> None:
    benchmark_champion()


@dg.schedule(
    job=nightly_benchmark,
    cron_schedule="30 2 * * *",
    name="every_night",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Half past two: benchmark the champion. Nothing happens while there is no champion.",
)
def every_night(context: dg.ScheduleEvaluationContext, plan: PlanResource) -> dg.RunRequest | dg.SkipReason:
    from prts_core.tracking import registry
    from prts_core.tracking.store import client

    name = plan.load().recipe.register.model_name
    if registry.version_of_alias(client(plan.folder), name, registry.CHAMPION) is None:
        return dg.SkipReason(f"models:/{name}@champion does not exist yet")
    return dg.RunRequest(tags={"prts/model": name})
