"""The nightly regression test: the champion on every suite, and every new version on what it has no result on.

A policy does not change overnight; code, drivers and packages do. It knows neither simulator nor statistics: what is
due and what a result means is prts_core.evaluation.regression's.
"""

import dagster as dg

from assets.partitions import SUITE, VERSION, VERSIONS
from assets.regression import NIGHT_TAG
from assets.resources import PlanResource
from pipelines.jobs import nightly_benchmark
from prts_core.evaluation.regression import due


@dg.schedule(
    job=nightly_benchmark,
    cron_schedule="30 2 * * *",
    name="every_night",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Half past two: the champion on every suite, new challengers on those they have no result on. Nothing "
    "happens while nothing is registered.",
)
def every_night(context: dg.ScheduleEvaluationContext, plan: PlanResource) -> list[dg.RunRequest] | dg.SkipReason:
    loaded = plan.load()
    model = loaded.recipe.register.model_name
    tonight = due(loaded, plan.folder)
    if not tonight:
        return dg.SkipReason(f"models:/{model} has no champion yet, and no version without a result")
    context.instance.add_dynamic_partitions(str(VERSIONS.name), sorted({version for _, version in tonight}, key=int))
    night = f"{context.scheduled_execution_time:%Y-%m-%d}"
    return [
        dg.RunRequest(
            run_key=f"{night}/{model}/{version}/{suite}",
            partition_key=dg.MultiPartitionKey({SUITE: suite, VERSION: version}),
            tags={"prts/model": model, NIGHT_TAG: night},
        )
        for suite, version in tonight
    ]
