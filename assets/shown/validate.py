"""Show a validation: every group of laws as a check of its own, failures as a table.

A failed blocking check materialises nothing and stops what follows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from assets.metadata import Check, Shown, table
from prts_core.config.load import RunPlan
from prts_core.data.validation.report import COLUMNS, ValidationFailed, ValidationReport
from prts_core.io.errors import PrtsError

CHECKS = (
    Check("tables", "Parquet tables have the columns, types, widths and finite numbers that info.json promises.", True),
    Check("metadata", "info.json, episodes.jsonl, tasks.jsonl and contract.json are complete and well-formed.", True),
    Check("laws", "Episode lengths, indices, timestamps and tasks agree between the files.", True),
    Check("content", "Every file is as it was when the dataset was sealed.", True),
    Check("physics", "Limits, jumps, frozen or copied rows, still cameras and grippers: worth a look, stops nothing."),
    Check("statistics", "Statistics that lie in the dataset are those of its data.", True),
    Check("video", "Every video is there, decodes, and has one frame a row in the promised size.", True),
)
# Of laws whose check is not "laws".
CHECK_OF = {"metadata": "metadata", "videos": "video", "seal": "content"}
CHECK_OF |= dict.fromkeys(("statistics", "episode statistics"), "statistics")
CHECK_OF |= dict.fromkeys(
    ("limits", "jumps", "frozen", "duplicated", "gripper", "copies", "action shift", "dropped camera", "frozen camera"),
    "physics",
)
SHOWN_FAILURES = 20


def check_of(law: str) -> str:
    """Which of the asset's checks a law of `prts_core.data.validation` belongs to."""
    return "tables" if law.startswith("table") else CHECK_OF.get(law, "laws")


def results(output: Path, plan: RunPlan) -> list[dg.AssetCheckResult]:
    return list(_results(ValidationReport.load(output / "report.json")))


def failed(error: PrtsError) -> list[dg.AssetCheckResult]:
    return list(_results(error.report, str(error))) if isinstance(error, ValidationFailed) else []


def _results(report: ValidationReport, said: str = "") -> Iterator[dg.AssetCheckResult]:
    for check in CHECKS:
        part = ValidationReport(report.dataset, [f for f in report.findings if check_of(f.check) == check.name])
        shown: dict[str, Any] = {"errors": len(part.errors), "warnings": len(part.warnings)}
        if part.findings:
            first = [*part.errors, *part.warnings][:SHOWN_FAILURES]
            shown["failures"] = table(COLUMNS, [[getattr(finding, name) for name in COLUMNS] for finding in first])
        yield dg.AssetCheckResult(
            passed=part.ok if check.blocking else not part.findings,
            check_name=check.name,
            severity=dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN,
            description="; ".join([_counted(part), *([said] if part.errors and said else [])]),
            metadata=shown,
        )


def _counted(part: ValidationReport) -> str:
    return f"{len(part.errors)} failures, {len(part.warnings)} warnings" if part.findings else "no failure"


SHOWN = Shown(checks=CHECKS, results=results, failed=failed)
