"""Read the JSON files of a dataset, every line checked by pydantic; all faults are collected, none stops the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prts_core.contract import Contract
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.remote import remote_of
from prts_core.data.lerobot_v21.schema import TABLES, EpisodeRow, EpisodeStatsRow, Info, TaskRow, faults
from prts_core.data.lerobot_v21.v30 import VERSION, is_v30
from prts_core.data.validation.report import Finding, Severity, ValidationReport
from prts_core.io.errors import DataError
from prts_core.io.files import read_json, read_jsonl
from prts_core.io.object_storage import RemoteFolder

_CURE = "correct the file, or write the dataset again with lerobot 0.3.3"


@dataclass
class Metadata:
    """What could be read. info None: nothing else can be checked. Lists keep only lines that are valid."""

    info: Info | None = None
    episodes: list[EpisodeRow] = field(default_factory=list)
    tasks: list[TaskRow] = field(default_factory=list)
    stats: list[EpisodeStatsRow] = field(default_factory=list)
    contract: Contract | None = None
    remote: RemoteFolder | None = None

    def path(self, root: Path, file: str) -> Path:
        """A table or video of the dataset at `root`, downloaded where it lies in object storage."""
        return root / file if self.remote is None else self.remote.fetch(file)


def check_metadata(root: Path, report: ValidationReport, foreign: bool = False) -> Metadata:
    """Read everything under meta/, adding a finding per fault. foreign: a missing Contract only warns."""
    if (root / "meta" / "info.json").is_file() and _is_v30(root):
        meta = _of_v30(root, report)
    else:
        meta = _of_v21(root, report)
    meta.remote = remote_of(root)
    report.checks["metadata"] += 1
    file = "meta/contract.json"
    try:
        meta.contract = Contract.load(root / file)
    except DataError as err:
        severity: Severity = "warning" if foreign and not (root / file).exists() else "error"
        found, cure = str(err.found or err.problem), "`prts convert` makes it"
        report.add(Finding("metadata", file, found, "the dataset's Contract", cure, severity=severity))
    return meta


def _is_v30(root: Path) -> bool:
    try:
        return is_v30(root)
    except DataError:  # told by who reads it as v2.1
        return False


def _of_v30(root: Path, report: ValidationReport) -> Metadata:
    """Read v3.0's tables, which contradict each other at the first fault: nothing else can be checked then."""
    meta = Metadata()
    try:
        opened = LeRobotDataset.open(root)
        meta.episodes, meta.stats = list(opened.rows), list(opened.episode_stats().values())
        meta.tasks = [TaskRow(task_index=index, task=task) for index, task in opened.tasks.items()]
        meta.info = opened.info
        report.checks["metadata"] += 2 * len(meta.episodes) + len(meta.tasks) + 1
    except DataError as err:
        file = str(err.file or "meta")
        name = Path(file).relative_to(root).as_posix() if Path(file).is_relative_to(root) else file
        found = f"{f'{err.field}: ' if err.field else ''}{err.found or err.problem}"
        expected = str(err.expected or f"a readable table of LeRobot {VERSION}")
        report.add(Finding("metadata", name, found, expected, err.cure or "restore it from its source"))
    return meta


def _of_v21(root: Path, report: ValidationReport) -> Metadata:
    meta = Metadata()
    meta.info = _checked(Info, _read(read_json, root, "meta/info.json", report), "meta/info.json", None, report)
    for name, rows in (("episodes", meta.episodes), ("tasks", meta.tasks), ("episodes_stats", meta.stats)):
        file = f"meta/{name}.jsonl"
        for number, raw in enumerate(_read(read_jsonl, root, file, report) or []):
            row = _checked(TABLES[name], raw, file, number, report)
            if row is not None:
                rows.append(row)
    return meta


def _read(reader: Any, root: Path, file: str, report: ValidationReport) -> Any:
    try:
        return reader(root / file)
    except DataError as err:
        found = f"{f'{err.field}: ' if err.field else ''}{err.found or err.problem}"
        expected, cure = "a readable file of LeRobot v2.1", "restore it from its source"
        report.add(Finding("metadata", file, found, expected, cure))
        return None


def _checked(model: type[BaseModel], raw: Any, file: str, line: int | None, report: ValidationReport) -> Any:
    if raw is None:
        return None
    report.checks["metadata"] += 1
    try:
        row = model.model_validate(raw)
        _ = row.spans if isinstance(row, EpisodeRow) else None  # the subtasks' own form is checked with the line
        return row
    except ValidationError as err:
        for name, found, expected in faults(err):
            report.add(Finding("metadata", file, f"{name}: {found}", expected, _CURE, row=line))
        return None
