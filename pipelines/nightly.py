"""What happens by the clock once it is switched on: a look at the sources, and the nightly regression test.

A policy does not change overnight; code, drivers and packages do. What is due and what a result means is
prts_core.delivery.regression's.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import dagster as dg

from assets.recipes import SUITE, VERSION, RecipePage
from assets.regression import NIGHT_TAG
from pipelines.jobs import Jobs
from prts_core.delivery.regression import due
from prts_core.io.errors import lookup

HOUR, MINUTE = 2, 30  # when a night begins
PATIENCE_H = 10  # a night without any result after so many hours is overdue


def switched_on() -> bool:
    """Whether $PRTS_NIGHTLY says that this deployment measures every night: `on`."""
    return lookup({"on": True, "off": False}, os.environ.get("PRTS_NIGHTLY") or "off", "choice ($PRTS_NIGHTLY)")


def freshness() -> dg.FreshnessPolicy | None:
    """How Dagster notices a night that brought no result: schedule stopped on the page, registry silent, champion gone,
    run stuck in its queue. None of these is a failed run. Where the night is not switched on, nothing is overdue."""
    if not switched_on():
        return None
    return dg.FreshnessPolicy.cron(
        deadline_cron=f"{MINUTE} {HOUR + PATIENCE_H} * * *",
        lower_bound_delta=timedelta(hours=PATIENCE_H + 1),  # since the night began, and the hour by which clocks change
        timezone=timezone(),
    )


def schedules(page: RecipePage, jobs: Jobs, outputs: Path) -> list[dg.ScheduleDefinition]:
    """The recipe's schedules, stopped unless configured: a laptop with the page open must not start a benchmark at
    night."""
    found = [nightly_regression(page, jobs, outputs)]
    if jobs.observe is not None:
        found.append(
            dg.ScheduleDefinition(
                name=f"{page.identifier}_hourly_look_at_sources",
                job=jobs.observe,
                cron_schedule="0 * * * *",
                execution_timezone=timezone(),
                description="Every hour: list the files of external datasets, so that what is stale shows.",
            )
        )
    return found


def timezone() -> str:
    """$PRTS_TIMEZONE, such as Europe/Berlin; UTC where it is not set."""
    return os.environ.get("PRTS_TIMEZONE") or "UTC"


def nightly_regression(page: RecipePage, jobs: Jobs, outputs: Path) -> dg.ScheduleDefinition:
    @dg.schedule(
        job=jobs.regression,
        cron_schedule=f"{MINUTE} {HOUR} * * *",
        execution_timezone=timezone(),
        default_status=dg.DefaultScheduleStatus.RUNNING if switched_on() else dg.DefaultScheduleStatus.STOPPED,
        name=f"{page.identifier}_nightly_regression",
        description="Half past two: the champion on every suite, new challengers on those they have no result on. "
        "Nothing happens while nothing is registered.",
    )
    def every_night(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        model = page.plan.recipe.register.model_name
        tonight = due(page.plan, outputs)
        if not tonight:
            return dg.SkipReason(f"models:/{model} has no champion yet, and no version without a result")
        versions = sorted({version for _, version in tonight}, key=int)
        context.instance.add_dynamic_partitions(str(page.versions.name), versions)
        night = f"{context.scheduled_execution_time:%Y-%m-%d}"
        return [
            dg.RunRequest(
                run_key=f"{night}/{model}/{version}/{suite}",
                partition_key=dg.MultiPartitionKey({SUITE: suite, VERSION: version}),
                tags={"prts/model": model, NIGHT_TAG: night},
            )
            for suite, version in tonight
        ]

    return every_night
