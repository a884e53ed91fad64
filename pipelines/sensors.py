"""What is told when a run fails and nobody looks at the page."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from prts_core.io.files import write_json


def failed_check(context: dg.RunFailureSensorContext) -> str | None:
    """What the run's red check says; none where it failed before its check."""
    found = context.instance.all_logs(context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    for entry in found:
        event = entry.dagster_event
        if event is not None and not event.asset_check_evaluation_data.passed:
            return event.asset_check_evaluation_data.description
    return None


def alarm_sensor(outputs: Path) -> dg.SensorDefinition:
    """Watches every job of the page. Stopped until it is switched on there."""

    @dg.run_failure_sensor(
        name="alarm_on_failed_runs",
        description="Writes `<outputs>/alarms/<run>.json` when any run fails, for a mail job to pick up.",
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
        path = outputs / "alarms" / f"{context.dagster_run.run_id}.json"
        write_json(
            path,
            {
                "job": context.dagster_run.job_name,
                "recipe": context.dagster_run.tags.get("prts/recipe"),
                "partition": context.dagster_run.tags.get("dagster/partition"),
                "run_id": context.dagster_run.run_id,
                "time": datetime.now(UTC).isoformat(),
                "reason": told or context.failure_event.message,
            },
        )
        context.log.error(f"{context.dagster_run.job_name} failed: {told} ({path})")

    return alarm
