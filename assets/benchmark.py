"""Asset `benchmark`: closed loop in simulation, with a check of the success rate. Simulates nothing."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, failure, finish, markdown_table, run_stage_of
from assets.partitions import of_deployed
from assets.resources import DvcResource, PlanResource
from prts_core.errors import PrtsError
from prts_core.evaluation.intervals import wilson
from prts_core.files import read_json


@dg.asset(
    **declare(
        "benchmark",
        group="evaluation",
        team="evaluation",
        kinds={"python", "pytorch"},
        deps=[of_deployed("convert"), of_deployed("sft")],
    ),
    check_specs=[
        dg.AssetCheckSpec(
            "success_rate_above_floor",
            asset="benchmark",
            description="Success rate over all episodes against the recipe's floor; warns, the gate decides.",
        )
    ],
)
def benchmark(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    try:
        manifest = run_stage_of(context, plan)
        if manifest.skipped:
            checks = [
                dg.AssetCheckResult(passed=True, check_name="success_rate_above_floor", description=manifest.skipped)
            ]
        else:
            report = read_json(manifest.folder(plan.folder) / "report.json")
            checks = [success_check(report, plan.load().recipe.register.floor)]
        yield from finish(context, manifest, plan, dvc, checks)
    except PrtsError as err:
        raise failure(err) from err


def success_check(report: dict[str, Any], floor: float) -> dg.AssetCheckResult:
    """Passed when the Wilson interval's lower bound over all episodes exceeds `floor`; the table shows every task."""
    rows, episodes, successes = [], 0, 0
    for name, task in sorted(report["tasks"].items()):
        alone = wilson(task["successes"], task["n"])
        rows.append(
            [name, f"{task['successes']}/{task['n']}", f"{alone.lower:.2f} - {alone.upper:.2f}", task["max_steps"]]
        )
        episodes, successes = episodes + task["n"], successes + task["successes"]
    rate = wilson(successes, episodes)
    return dg.AssetCheckResult(
        passed=rate.lower > floor,
        check_name="success_rate_above_floor",
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(
            [
                f"{successes}/{episodes}, 95 % interval {rate.lower:.3f} - {rate.upper:.3f}, floor {floor}",
                *report["labels"],
            ]
        ),
        metadata={
            "success_rate": float(report["success_rate"]),
            "lower": rate.lower,
            "upper": rate.upper,
            "floor": floor,
            "tasks": dg.MetadataValue.md(markdown_table(["task", "success", "95 % interval", "step limit"], rows)),
        },
    )
