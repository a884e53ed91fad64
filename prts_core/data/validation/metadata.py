"""Read the JSON files of a dataset, every line checked by pydantic; all faults are collected, none stops the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prts_core.contract import Contract
from prts_core.data.lerobot_v21.schema import TABLES, EpisodeRow, EpisodeStatsRow, Info, TaskRow, faults
from prts_core.data.validation.report import Finding, ValidationReport
from prts_core.io.errors import DataError
from prts_core.io.files import read_json, read_jsonl

_CURE = "correct the file, or write the dataset again with lerobot 0.3.3"


@dataclass
class Metadata:
    """What could be read. info None: nothing else can be checked. Lists keep only lines that are valid."""

    info: Info | None = None
    episodes: list[EpisodeRow] = field(default_factory=list)
    tasks: list[TaskRow] = field(default_factory=list)
    stats: list[EpisodeStatsRow] = field(default_factory=list)
    contract: Contract | None = None


def check_metadata(root: Path, report: ValidationReport, foreign: bool = False) -> Metadata:
    """Read everything under meta/, adding a finding per fault. foreign: a missing Contract only warns."""
    meta = Metadata()
    meta.info = _checked(Info, _read(read_json, root, "meta/info.json", report), "meta/info.json", None, report)
    for name, rows in (("episodes", meta.episodes), ("tasks", meta.tasks), ("episodes_stats", meta.stats)):
        file = f"meta/{name}.jsonl"
        for number, raw in enumerate(_read(read_jsonl, root, file, report) or []):
            row = _checked(TABLES[name], raw, file, number, report)
            if row is not None:
                rows.append(row)
    report.checks["metadata"] += 1
    path = root / "meta" / "contract.json"
    try:
        meta.contract = Contract.load(path)
    except DataError as err:
        found = str(err.found or err.problem)
        absent = foreign and not path.exists()
        report.add(
            Finding(
                "metadata",
                "meta/contract.json",
                found,
                "the dataset's Contract",
                "`prts convert` makes it",
                severity="warning" if absent else "error",
            )
        )
    return meta


def _read(reader: Any, root: Path, file: str, report: ValidationReport) -> Any:
    try:
        return reader(root / file)
    except DataError as err:
        where = f"{err.field}: " if err.field else ""
        found = f"{where}{err.found or err.problem}"
        report.add(
            Finding("metadata", file, found, "a readable file of LeRobot v2.1", cure="restore it from its source")
        )
        return None


def _checked(model: type[BaseModel], raw: Any, file: str, line: int | None, report: ValidationReport) -> Any:
    if raw is None:
        return None
    report.checks["metadata"] += 1
    try:
        meta = model.model_validate(raw)
        if isinstance(meta, EpisodeRow):
            _ = meta.spans  # the subtasks' own form is checked with the line
        return meta
    except ValidationError as err:
        for name, found, expected in faults(err):
            report.add(Finding("metadata", file, f"{name}: {found}", expected, _CURE, row=line))
        return None
