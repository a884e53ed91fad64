"""`make demo`: the whole chain through Dagster in one process, then `outputs/demo/report.json` and a table.

Started again it goes on where it was; when everything is finished it verifies every digest and runs nothing.
It knows the order of jobs, not what any stage does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import dagster as dg
from rich.console import Console

from prts_core.config.load import Plan, load_plan, source_root
from prts_core.config.schema import ExpertSource, MetaworldSource
from prts_core.errors import PrtsError, StageError
from prts_core.manifest import Manifest
from prts_core.stages import chain
from prts_core.stages.base import find_finished, load_manifest

PID_TAG = "prts/pid"  # of the process a run lives in, so that a killed one is not shown as running for ever
DAGSTER_YAML = Path(__file__).with_name("dagster.yaml")


def finished(plan: Plan, outputs: Path) -> bool:
    """True when every stage stands under this very plan with intact content (or has still nothing to work on)."""
    return all(_done(plan, stage, partition, outputs) is not None for stage, partition in chain.steps(plan))


def _done(plan: Plan, stage: str, partition: str | None, outputs: Path) -> Manifest | None:
    if partition and _absent(plan, partition):
        try:
            manifest = load_manifest(outputs, stage, plan.recipe.name, partition)
        except StageError:
            return None
        return manifest if manifest.skipped else None
    return find_finished(chain.STAGES[stage], plan, partition, outputs)


def _absent(plan: Plan, dataset: str) -> bool:
    """Reference data that this machine does not have."""
    source = plan.datasets[dataset].source
    return not isinstance(source, MetaworldSource | ExpertSource) and not source_root(source).exists()


def prepare_home(outputs: Path) -> None:
    """DAGSTER_HOME (default `<outputs>/dagster`) with our settings, made where it is missing."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str((outputs / "dagster").resolve())))
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        shutil.copyfile(DAGSTER_YAML, home / "dagster.yaml")


def close_killed_runs(instance: dg.DagsterInstance) -> None:
    """Runs whose process is gone (`kill -9`, power cut) are marked as failed; their stages go on in the next run."""
    alive = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING]
    for run in instance.get_runs(dg.RunsFilter(statuses=alive)):
        pid = run.tags.get(PID_TAG)
        if pid and not Path(f"/proc/{pid}").exists():
            instance.report_run_failed(run, "The process of this run was killed; the next run goes on from there.")


def run_job(name: str, partition: str, instance: dg.DagsterInstance) -> None:
    """Run one job of the code location in this process; a failed step's own paragraph becomes the StageError."""
    from pipelines.definitions import definitions

    job = definitions().resolve_job_def(name)
    result = job.execute_in_process(
        instance=instance, partition_key=partition, tags={PID_TAG: str(os.getpid())}, raise_on_error=False
    )
    if not result.success:
        raise StageError(f"Job {name!r} stopped: {_why(result)}", cure="then `make demo` again; it goes on from there")


def _why(result: dg.ExecuteInProcessResult) -> str:
    """What the stage that failed says about it, in its own words."""
    for check in result.get_asset_check_evaluations():
        if not check.passed and check.blocking:
            return f"{check.asset_key.to_user_string()} failed its check {check.check_name!r}: {check.description}"
    for event in result.get_step_failure_events():
        data = event.step_failure_data
        if data.user_failure_data is not None and data.user_failure_data.description:
            return f"{event.step_key} failed: {data.user_failure_data.description}"
        if data.error is not None:
            cause = data.error.cause or data.error
            return f"{event.step_key} failed: {' '.join(cause.message.split())}"
    return "no step says why; `make ui` shows the run"


def main(argv: list[str] | None = None) -> int:
    from pipelines import environments, report

    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.parse_args(argv)
    console, begun = Console(soft_wrap=True), time.monotonic()
    try:
        target = environments.plan()
        plan, outputs = load_plan(Path(target.recipe), target.overrides), target.folder
        if finished(plan, outputs):
            console.print("Everything is finished and intact: nothing to do.")
        else:
            others = [name for name in plan.datasets if name != plan.recipe.deploy]
            prepare_home(outputs)
            with dg.DagsterInstance.get() as instance:
                close_killed_runs(instance)
                run_job("demo", plan.recipe.deploy, instance)
                for name in others:
                    run_job("import_dataset", name, instance)
        path = report.write(plan, outputs)
        report.show(path, console)
        console.print(f"{path}, {time.monotonic() - begun:.1f} s this time", highlight=False)
        return 0
    except PrtsError as err:
        Console(stderr=True, soft_wrap=True).print(f"error: {err}", style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        print("interrupted; `make demo` goes on from here", file=sys.stderr)
        return 130
