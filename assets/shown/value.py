"""Show how close the policy thinks it is to its goal, with a check that names bad demonstrations."""

from pathlib import Path
from typing import Any

import dagster as dg

from assets.metadata import Check, Shown, inline_picture, table
from prts_core.config.load import RunPlan
from prts_core.io.files import read_json

CHECK = Check(
    "demonstrations_rise",
    "The value rises along every ranked demonstration under its own sentence; warns and lists those that look "
    "reversed, frozen or mislabelled.",
)
SHOWN_ROWS = 50


def results(output: Path, plan: RunPlan) -> list[dg.AssetCheckResult]:
    """Passed when no ranked demonstration is flagged; the table lists the flagged ones, worst first."""
    ranking = read_json(output / "ranking.json")
    flagged = [verdict for verdict in ranking["verdicts"] if verdict["flag"]]
    shown: dict[str, Any] = {"ranked": len(ranking["verdicts"]), "flagged": len(flagged)}
    if flagged:
        shown["demonstrations"] = table(
            ["episode", "sentence", "flag", "why", "score"],
            [
                [v["episode"], v["instruction"], v["flag"]["reason"], v["flag"]["detail"], round(v["score"], 2)]
                for v in flagged[:SHOWN_ROWS]
            ],
        )
    if ranking["unsure"]:
        shown["unsure"] = table(["sentence", "why its episodes cannot be judged"], list(ranking["unsure"].items()))
    if (output / "ranking.png").is_file():
        shown["worst"] = dg.MetadataValue.md(inline_picture(output / "ranking.png"))
    named = ": episodes " + ", ".join(str(v["episode"]) for v in flagged[:SHOWN_ROWS]) if flagged else ""
    return [
        dg.AssetCheckResult(
            passed=not flagged,
            check_name=CHECK.name,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"{len(flagged)} of {len(ranking['verdicts'])} demonstrations are flagged{named}",
            metadata=shown,
        )
    ]


SHOWN = Shown(checks=(CHECK,), results=results)
