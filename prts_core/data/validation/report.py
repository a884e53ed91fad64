"""Show what validation found, to people and machines: findings, a table, a readable page."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from prts_core.io.errors import DataError
from prts_core.io.files import read_json, write_json, write_text

Severity = Literal["error", "warning"]
COLUMNS = ("severity", "check", "file", "row", "found", "expected", "cure")


@dataclass(frozen=True)
class Finding:
    """One fault. check: the law it breaks. file: relative to the dataset. row: line or table row, counted from 0."""

    check: str
    file: str
    found: str
    expected: str
    cure: str = "restore the file from its source, or convert again"
    row: int | None = None
    severity: Severity = "error"


@dataclass
class ValidationReport:
    """All findings about one dataset. checks: law -> how many files, rows or records it was applied to."""

    dataset: str
    findings: list[Finding] = field(default_factory=list)
    checks: Counter[str] = field(default_factory=Counter)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def ok(self) -> bool:
        """No error; warnings do not count."""
        return not self.errors

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)

    def frame(self) -> pl.DataFrame:
        """Findings as a table of strings (row: Int64), errors first."""
        rows = [{name: getattr(f, name) for name in COLUMNS} for f in (*self.errors, *self.warnings)]
        schema = {name: pl.Int64 if name == "row" else pl.String for name in COLUMNS}
        return pl.DataFrame(rows, schema=schema)

    def failures_markdown(self, limit: int = 20) -> str:
        """The first `limit` findings as a markdown table, errors first; "" when there are none."""
        shown = [*self.errors, *self.warnings]
        if not shown:
            return ""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for finding in shown[:limit]:
            cells = ("" if getattr(finding, name) is None else str(getattr(finding, name)) for name in COLUMNS)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ")[:160] for cell in cells) + " |")
        if len(shown) > limit:
            lines.append(f"\n... and {len(shown) - limit} more.")
        return "\n".join(lines)

    def markdown(self) -> str:
        """The whole report as a page."""
        verdict = "sound" if self.ok else f"{len(self.errors)} errors"
        laws = "\n".join(
            f"| {law} | {count} | {sum(1 for f in self.findings if f.check == law)} |"
            for law, count in sorted(self.checks.items())
        )
        return (
            f"# Validation of {self.dataset}: {verdict}, {len(self.warnings)} warnings\n\n"
            + (f"{self.failures_markdown(100)}\n\n" if self.findings else "")
            + f"| check | applied to | findings |\n|---|---|---|\n{laws}\n"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "ok": self.ok,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "checks": dict(self.checks),
            "findings": [asdict(finding) for finding in (*self.errors, *self.warnings)],
        }

    @staticmethod
    def load(path: Path) -> ValidationReport:
        """What `save` wrote as JSON."""
        raw = read_json(path)
        try:
            findings = [Finding(**row) for row in raw["findings"]]
            return ValidationReport(str(raw["dataset"]), findings, Counter(raw["checks"]))
        except (KeyError, TypeError) as err:
            raise DataError(
                "A validation report is malformed", file=path, found=f"{type(err).__name__}: {err}"
            ) from err

    def save(self, folder: Path, name: str = "report") -> None:
        """Write <name>.json and <name>.md."""
        write_json(folder / f"{name}.json", self.to_json())
        write_text(folder / f"{name}.md", self.markdown())


class ValidationFailed(DataError):
    """A dataset that breaks its format or laws; `report` has every finding."""

    def __init__(self, report: ValidationReport, where: object) -> None:
        first, others = report.errors[0], len(report.errors) - 1
        super().__init__(
            f"Dataset {report.dataset!r} breaks the law {first.check!r}"
            + (f" ({others} more errors in the report)" if others else ""),
            file=first.file,
            field=None if first.row is None else f"row {first.row}",
            found=first.found,
            expected=first.expected,
            cure=f"{first.cure}; the whole table is in {where}",
        )
        self.report = report
