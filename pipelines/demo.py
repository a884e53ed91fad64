"""`make demo`: the whole chain through Dagster in one process, then `outputs/demo/report.json` and a table.

Started again it goes on where it was; when everything is finished it verifies every result and runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import uuid
from pathlib import Path

import dagster as dg
from dagster._core.instance.ref import InstanceRef
from rich.console import Console

from assets.launch import STOPPED
from assets.recipes import RecipePage, recipe_pages
from pipelines import report
from pipelines.home import prepare_home, prepare_instance
from pipelines.jobs import jobs
from pipelines.terminal import QUIET, Lines
from prts_core.config.load import RunPlan
from prts_core.config.places import outputs_folder
from prts_core.io.errors import PrtsError, Skipped, StageError
from prts_core.io.files import read_json
from prts_core.stages import chain
from prts_core.tracking.store import ui_address

NO_RETRY = {"dagster/max_retries": "0"}  # the next `make demo` goes on; the page's daemon must not


def finished(plan: RunPlan, outputs: Path) -> bool:
    """True when every stage stands under this very plan with intact content, or is skipped, and the policy is
    registered."""
    found = report.results(plan, outputs)
    registered = report.registration(plan, outputs)
    if registered is None or any(result is None for result in found.values()):
        return False
    recorded = read_json(registered).get("content_digest")
    return recorded == found["package", None].content_digest  # type: ignore[union-attr]


def parts(page: RecipePage) -> list[tuple[str, str]]:
    """(job, dataset) in order: what pre-training draws from, the chain of the deployed dataset, the other datasets."""
    own, deploy = jobs(page), page.plan.recipe.deploy
    others = [name for name in page.plan.datasets if name != deploy]
    first = [(own.data.name, name) for name in others if name in page.plan.mixture]
    return [*first, (own.chain.name, deploy), *((own.imported.name, name) for name in others)]


def run_job(defs: dg.Definitions, name: str, partition: str, instance: dg.DagsterInstance, console: Console) -> None:
    """Run one job in this process, telling how it goes; a failed step's own paragraph becomes the StageError."""
    lines, run_id = Lines(console, partition), str(uuid.uuid4())
    instance.add_event_listener(run_id, lines)
    result = defs.resolve_job_def(name).execute_in_process(
        instance=instance, partition_key=partition, run_id=run_id, run_config=QUIET, tags=NO_RETRY, raise_on_error=False
    )
    if any(STOPPED in cause for cause in lines.causes):
        raise KeyboardInterrupt
    if not result.success:
        why = lines.causes[0] if lines.causes else "no step says why; `make ui` shows the run"
        raise StageError(f"Job {name!r} stopped: {why}", cure="then `make demo` again; it goes on from there")


def open_instance() -> dg.DagsterInstance:
    """The instance of DAGSTER_HOME. On a terminal Dagster captures no output, so that progress bars stay bars."""
    if not sys.stderr.isatty():
        return dg.DagsterInstance.get()
    none = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    return dg.DagsterInstance.from_ref(
        InstanceRef.from_dir(os.environ["DAGSTER_HOME"], overrides={"compute_logs": none})
    )


def require_data(plan: RunPlan, outputs: Path) -> None:
    """StageError where the deployed policy needs a dataset that is not here: nothing after it could run."""
    try:
        chain.store(outputs).resolve("package", plan)
    except Skipped as err:
        raise StageError(
            f"The policy of dataset {plan.recipe.deploy!r} needs data that is not here: {err.problem}",
            file=err.file,
            field=err.field,
            found=err.found,
            expected=err.expected,
            cure=err.cure,
        ) from err


def main(argv: list[str] | None = None) -> int:
    from pipelines.definitions import build

    argparse.ArgumentParser(prog="make demo", description=__doc__).parse_args(argv)
    console, begun = Console(file=sys.stdout, soft_wrap=True), time.monotonic()
    try:
        page, outputs = recipe_pages()[0], outputs_folder()
        require_data(page.plan, outputs)
        if finished(page.plan, outputs):
            console.print("Everything is finished and intact: nothing to do.")
        else:
            prepare_home(outputs)
            defs = build([page], outputs, launch="inline")
            log = outputs / "demo" / "stages.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with open_instance() as instance, log.open("a") as file, contextlib.redirect_stdout(file):
                prepare_instance(instance)
                for job, dataset in parts(page):
                    run_job(defs, job, dataset, instance, console)
        path = report.write(page.plan, outputs)
        report.show(path, console)
        console.print(f"{path}, {time.monotonic() - begun:.1f} s this time", highlight=False)
        dagster, mlflow = (ui_address(name, outputs) for name in ("dagster", "mlflow"))
        console.print(f"`make ui` shows it all: Dagster {dagster}, MLflow {mlflow}", highlight=False)
        return 0
    except PrtsError as err:
        Console(stderr=True, soft_wrap=True).print(f"error: {err}", style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        print("interrupted; `make demo` goes on from here", file=sys.stderr)
        return 130
