"""Prepare DAGSTER_HOME: settings, pools of work that this machine can do at once, runs that a kill left behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import dagster as dg

DAGSTER_YAML = Path(__file__).with_name("dagster.yaml")
UNDER_WAY = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def prepare_home(outputs: Path) -> None:
    """DAGSTER_HOME (default `<outputs>/dagster`) with our settings, made where it is missing."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str((outputs / "dagster").resolve())))
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        shutil.copyfile(DAGSTER_YAML, home / "dagster.yaml")


def prepare_instance(instance: dg.DagsterInstance) -> None:
    """Give the pools their sizes where nobody has, and end the runs whose process is gone."""
    storage = instance.event_log_storage
    known = {pool.name for pool in storage.get_pool_limits()}
    for pool, slots in {"gpu": 1, "cpu": os.cpu_count() or 1}.items():
        if pool not in known:
            storage.set_concurrency_slots(pool, slots)
    for run in instance.get_runs(dg.RunsFilter(statuses=UNDER_WAY)):
        pids = _pids(instance, run.run_id)
        if pids and not any(Path(f"/proc/{pid}").exists() for pid in pids):
            instance.report_run_failed(run, "The process of this run was killed; the next run goes on from there.")
            storage.free_concurrency_slots_for_run(run.run_id)


def _pids(instance: dg.DagsterInstance, run_id: str) -> set[int]:
    """Processes that the run's events name."""
    found: set[int] = set()
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        pid = entry.get_dagster_event().engine_event_data.metadata.get("pid")
        if pid is not None and str(pid.value).isdecimal():
            found.add(int(str(pid.value)))
    return found
