"""Run stages of the chain, find their results, register its package: what `prts`, Dagster and DVC call.

The stages themselves are declared in declarations.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prts_core.config.load import RunPlan
from prts_core.io.errors import PrtsError, Skipped, StageError, lookup
from prts_core.launch.together import launched
from prts_core.launch.where import Launch, default_launch
from prts_core.stages.declarations import STAGES
from prts_core.stages.elsewhere import executor, run_launched
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import Execute, Store
from prts_core.store.views import show_skipped, view_folder


def run(
    name: str,
    plan: RunPlan,
    partition: str | None = None,
    outputs: Path = Path("outputs"),
    caller: dict[str, str] | None = None,
    launch: Launch | None = None,
) -> Manifest:
    """Run (or find finished) the stage `name`: what `prts <name>`, the Dagster asset and the DVC stage all call.

    launch: where its function runs; none: what $PRTS_LAUNCH says. Under a launcher that has started several processes,
    those that only help end here by SystemExit.
    """
    from prts_core.tracking.runs import stage_run

    stage = lookup(STAGES, name, "stage")

    def run_by(execute: Execute) -> Manifest:
        return store(outputs).run(name, plan, partition, caller=caller, track=stage_run, execute=execute)

    try:
        return (
            run_launched(stage, plan, run_by) if launched() > 1 else run_by(executor(launch or default_launch(), plan))
        )
    except PrtsError as err:
        complete_cure(err, plan, partition, outputs)
        raise


def complete_cure(err: PrtsError, plan: RunPlan, partition: str | None, outputs: Path) -> None:
    """Make a cure that names a bare stage, "run `prts convert`", the command for this plan: with its recipe, dataset,
    changed values and outputs."""

    def whole(match: re.Match[str]) -> str:
        stage = STAGES.get(match[1])
        chosen = partition or plan.recipe.deploy if stage is not None and stage.partitioned else None
        return match[0] if stage is None else f"`{plan.command(stage.name, chosen, outputs)}`"

    if err.cure is not None and (cure := re.sub(r"`prts (\w+)`", whole, err.cure)) != err.cure:
        err.set_cure(cure)


def note_skip(name: str, plan: RunPlan, partition: str | None, outputs: Path, why: Skipped) -> None:
    """Make the recipe's view say that this stage's optional dataset is not here: what DVC keeps of it."""
    chosen = partition or (plan.recipe.deploy if STAGES[name].partitioned else None)
    if not plan.overrides:
        show_skipped(view_folder(outputs, plan.recipe.name, name, chosen), why.problem, outputs)


def store(outputs: Path) -> Store:
    """The results of the chain under `outputs`."""
    return Store(outputs, STAGES)


def finished(name: str, plan: RunPlan, partition: str | None, outputs: Path) -> Manifest:
    """The verified result of a stage under this plan, or a StageError that says how to make it."""
    results = store(outputs)
    resolved = results.resolve(name, plan, partition)
    manifest = results.find(resolved, plan)
    if manifest is None:
        raise StageError(
            f"Stage {resolved.name!r} has not run yet under this plan",
            file=results.folder(resolved),
            found="no result",
            cure=f"run `{plan.command(name, resolved.partition, outputs)}` first",
        )
    return manifest


def register(
    plan: RunPlan, outputs: Path, caller: dict[str, str] | None = None, key: Path | None = None
) -> dict[str, Any]:
    """Register the recipe's finished package: `delivery.register.register_package` on the results of this plan."""
    from prts_core.delivery.register import register_package

    package, benchmark = (finished(name, plan, None, outputs) for name in ("package", "benchmark"))
    return register_package(plan, package, benchmark, outputs, caller, key)
