"""Asset `value`: how close the policy thinks it is to its goal, with a check that names bad demonstrations.

A thin caller: the stage ranks the demonstrations, the check reads the result.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, failure, finish, inline_picture, markdown_table, run_stage_of
from assets.partitions import of_deployed
from assets.resources import DvcResource, PlanResource
from prts_core.errors import PrtsError
from prts_core.files import read_json

CHECK = "demonstrations_rise"
SHOWN = 50  # rows of the table


@dg.asset(
    **declare(
        "value",
        group="evaluation",
        team="evaluation",
        kinds={"matplotlib", "pytorch"},
        deps=[of_deployed("convert"), of_deployed("sft"), "benchmark"],
    ),
    check_specs=[
        dg.AssetCheckSpec(
            CHECK,
            asset="value",
            description="The value rises along every ranked demonstration under its own sentence; warns and lists "
            "those that look reversed, frozen or mislabelled.",
        )
    ],
)
def value(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    try:
        manifest = run_stage_of(context, plan)
        if manifest.skipped:
            check = dg.AssetCheckResult(passed=True, check_name=CHECK, description=manifest.skipped)
        else:
            folder = manifest.folder(plan.folder)
            check = ranking_check(read_json(folder / "ranking.json"))
            picture = folder / "ranking.png"
            if picture.is_file():
                check = check._replace(
                    metadata={**check.metadata, "worst": dg.MetadataValue.md(inline_picture(picture))}
                )
        yield from finish(context, manifest, plan, dvc, [check])
    except PrtsError as err:
        raise failure(err) from err


def ranking_check(ranking: dict[str, Any]) -> dg.AssetCheckResult:
    """Passed when no ranked demonstration is flagged; the table lists the flagged ones, worst first."""
    flagged = [verdict for verdict in ranking["verdicts"] if verdict["flag"]]
    rows = [
        [v["episode"], v["instruction"], v["flag"]["reason"], v["flag"]["detail"], f"{v['score']:+.2f}"]
        for v in flagged[:SHOWN]
    ]
    shown: dict[str, Any] = {"ranked": len(ranking["verdicts"]), "flagged": len(flagged)}
    if rows:
        header = ["episode", "sentence", "flag", "why", "score"]
        shown["demonstrations"] = dg.MetadataValue.md(markdown_table(header, rows))
    if ranking["unsure"]:
        table = markdown_table(
            ["sentence", "why its episodes cannot be judged"], [list(i) for i in ranking["unsure"].items()]
        )
        shown["unsure"] = dg.MetadataValue.md(table)
    return dg.AssetCheckResult(
        passed=not flagged,
        check_name=CHECK,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{len(flagged)} of {len(ranking['verdicts'])} demonstrations are flagged"
        + (": episodes " + ", ".join(str(v["episode"]) for v in flagged[:SHOWN]) if flagged else ""),
        metadata=shown,
    )
