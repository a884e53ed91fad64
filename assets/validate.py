"""Asset `validate`: the dataset's tables, metadata, laws and videos as blocking checks. A thin caller; knows no law.

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
    "video": "Every video is there, decodes, and has one frame a row in the promised size.",
}
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
        said = manifest.skipped or "no failure"
        passed = [dg.AssetCheckResult(passed=True, check_name=name, description=said) for name in CHECKS]
        yield from finish(context, manifest, plan, dvc, passed)
    except ValidationFailed as err:
        yield from check_results(err)
    except PrtsError as err:
        raise failure(err) from err


def check_of(law: str) -> str:
    """Which of the asset's checks a law of `prts_core.data.validation` belongs to."""
    if law.startswith("table"):
        return "tables"
    return {"metadata": "metadata", "videos": "video"}.get(law, "laws")


def check_results(err: ValidationFailed) -> Iterator[dg.AssetCheckResult]:
    """One result a check; those with errors carry their findings as a table."""
    for name in CHECKS:
        findings = [finding for finding in err.report.findings if check_of(finding.check) == name]
        part = ValidationReport(err.report.dataset, findings)
        shown = {"failures": dg.MetadataValue.md(part.failures_markdown(SHOWN_FAILURES))} if findings else {}
        yield dg.AssetCheckResult(
            passed=part.ok,
            check_name=name,
            description="no failure" if part.ok else f"{len(part.errors)} failures; {err}",
            metadata={"errors": len(part.errors), "warnings": len(part.warnings), **shown},
        )
