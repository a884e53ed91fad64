"""What is told when a run fails at night and nobody looks at the page. Knows no stage."""

from datetime import UTC, datetime

import dagster as dg

from pipelines.environments import plan
from pipelines.jobs import nightly_benchmark
from prts_core.files import write_json


def failed_check(context: dg.RunFailureSensorContext) -> str | None:
    """What the run's red check says; none where it failed before its check."""
    found = context.instance.all_logs(context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    for entry in found:
        event = entry.dagster_event
        if event is not None and not event.asset_check_evaluation_data.passed:
            return event.asset_check_evaluation_data.description
    return None


@dg.run_failure_sensor(
    name="alarm",
    monitored_jobs=[nightly_benchmark],
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Writes `<outputs>/alarms/<run>.json` when the nightly benchmark fails, for a mail job to pick up.",
)
def alarm(context: dg.RunFailureSensorContext) -> None:
    told = failed_check(context) or next(
        (
            event.step_failure_data.user_failure_data.description
            for event in context.get_step_failure_events()
            if event.step_failure_data.user_failure_data is not None
        ),
        None,
    )
    path = plan().folder / "alarms" / f"{context.dagster_run.run_id}.json"
    write_json(
        path,
        {
            "job": context.dagster_run.job_name,
            "partition": context.dagster_run.tags.get("dagster/partition"),
            "run_id": context.dagster_run.run_id,
            "time": datetime.now(UTC).isoformat(),
            "reason": told or context.failure_event.message,
        },
    )
    context.log.error("%s failed: %s (%s)", context.dagster_run.job_name, told, path)
