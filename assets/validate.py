"""Asset `validate`: the dataset's bytes, tables, laws, videos, physics as blocking checks. A thin caller, knows no law.

A failed check materialises nothing, stops what follows and shows its failures as a table.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, failure, finish, run_stage_of
from assets.resources import DvcResource, PlanResource
from prts_core.data.validation.report import ValidationFailed, ValidationReport
from prts_core.errors import PrtsError

CHECKS = {
    "tables": "Every parquet table has the columns, types, widths and finite numbers that info.json promises.",
    "metadata": "info.json, episodes.jsonl, tasks.jsonl and contract.json are complete and well-formed.",
    "laws": "Episode lengths, indices, timestamps and tasks agree between the files.",
    "content": "Every file is as it was when the dataset was sealed.",
    "physics": "Limits, jumps, frozen or copied rows, still cameras and grippers: worth a look, blocks nothing.",
    "statistics": "Statistics that lie in the dataset are those of its data.",
    "video": "Every video is there, decodes, and has one frame a row in the promised size.",
}
# Of laws whose check is not "laws".
CHECK_OF = {"metadata": "metadata", "videos": "video", "seal": "content"}
CHECK_OF |= dict.fromkeys(("statistics", "episode statistics"), "statistics")
CHECK_OF |= dict.fromkeys(
    ("limits", "jumps", "frozen", "duplicated", "gripper", "copies", "action shift", "dropped camera", "frozen camera"),
    "physics",
)
SHOWN_FAILURES = 20


@dg.asset(
    **declare("validate", group="data", team="data", kinds={"pandera", "polars"}, deps=["convert"]),
    check_specs=[
        dg.AssetCheckSpec(name, asset="validate", blocking=True, description=said) for name, said in CHECKS.items()
    ],
)
def validate(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    try:
        manifest = run_stage_of(context, plan)
        page = manifest.folder(plan.folder) / "report.json"
        report = ValidationReport.load(page) if page.is_file() else ValidationReport(manifest.partition or "")
        yield from finish(context, manifest, plan, dvc, list(check_results(report, manifest.skipped or "")))
    except ValidationFailed as err:
        yield from check_results(err.report, str(err))
    except PrtsError as err:
        raise failure(err) from err


def check_of(law: str) -> str:
    """Which of the asset's checks a law of `prts_core.data.validation` belongs to."""
    if law.startswith("table"):
        return "tables"
    return CHECK_OF.get(law, "laws")


def check_results(report: ValidationReport, said: str) -> Iterator[dg.AssetCheckResult]:
    """One result a check; those with findings carry them as a table. said: why there are none, or what failed."""
    for name in CHECKS:
        findings = [finding for finding in report.findings if check_of(finding.check) == name]
        part = ValidationReport(report.dataset, findings)
        shown = {"failures": dg.MetadataValue.md(part.failures_markdown(SHOWN_FAILURES))} if findings else {}
        yield dg.AssetCheckResult(
            passed=part.ok,
            check_name=name,
            description=(said if report.ok and said else "no failure")
            if part.ok
            else f"{len(part.errors)} failures; {said}",
            metadata={"errors": len(part.errors), "warnings": len(part.warnings), **shown},
        )
