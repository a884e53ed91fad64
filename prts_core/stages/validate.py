"""Stage validate: every fault of a dataset in one report; a dataset with errors stops the chain here.

The report of a failed validation stays in the run folder as failed-report.{json,md}, where Dagster and people find it.
"""

from __future__ import annotations

from prts_core.config.schema import ValidateConfig
from prts_core.contract import Contract
from prts_core.data.validation import ValidationFailed, validate_dataset
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult

FAILED = "failed-report"


def validate(config: ValidateConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Write report.json and report.md; raises ValidationFailed, which carries the report, where there are errors."""
    root = inputs["convert"].folder(context.outputs)
    report = validate_dataset(root, "every" if config.decode_video else "ends", name=config.dataset)
    folder = context.work.parent
    if not report.ok:
        report.save(folder, FAILED)
        raise ValidationFailed(report, where=folder / f"{FAILED}.md")
    report.save(context.output)
    for suffix in ("json", "md"):
        (folder / f"{FAILED}.{suffix}").unlink(missing_ok=True)
    return StageResult(
        metrics={
            "errors": 0,
            "warnings": len(report.warnings),
            "rows_checked": report.checks["table values"],
            "videos_checked": report.checks["videos"],
        },
        contracts={config.dataset: Contract.load(root / "meta" / "contract.json").fingerprint},
        artifacts=("report.md", "report.json"),
    )
