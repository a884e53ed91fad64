"""Show a closed-loop benchmark: a check of the success rate, a row a task."""

from pathlib import Path

import dagster as dg

from assets.metadata import Check, Shown, table
from prts_core.config.load import RunPlan
from prts_core.io.files import read_json
from prts_core.statistics.binomial import wilson

CHECK = Check(
    "success_rate_above_floor", "Success rate over all episodes against the recipe's floor; warns, the gate decides."
)


def results(output: Path, plan: RunPlan) -> list[dg.AssetCheckResult]:
    """Passed when the Wilson interval's lower bound over all episodes exceeds the floor."""
    report, floor = read_json(output / "report.json"), plan.recipe.register.floor
    rows, episodes, successes = [], 0, 0
    for name, task in sorted(report["tasks"].items()):
        n, good = task["n"], task["successes"]
        alone = wilson(good, n)
        rows.append([name, good, n, round(alone.lower, 3), round(alone.upper, 3), task["max_steps"]])
        episodes, successes = episodes + n, successes + good
    rate = wilson(successes, episodes)
    told = f"{successes}/{episodes}, 95 % interval {rate.lower:.3f} - {rate.upper:.3f}, floor {floor}"
    return [
        dg.AssetCheckResult(
            passed=rate.lower > floor,
            check_name=CHECK.name,
            severity=dg.AssetCheckSeverity.WARN,
            description="; ".join([told, *report["labels"]]),
            metadata={
                "success_rate": float(report["success_rate"]),
                "lower": rate.lower,
                "upper": rate.upper,
                "floor": floor,
                "tasks": table(["task", "successes", "episodes", "95 % from", "95 % to", "step limit"], rows),
            },
        )
    ]


SHOWN = Shown(checks=(CHECK,), results=results)
