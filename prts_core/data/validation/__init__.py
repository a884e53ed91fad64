"""Check a LeRobot v2.1 dataset whole: tables by pandera, metadata by pydantic, laws between files.

`validate_dataset` never stops at the first fault and changes nothing on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl

from prts_core.data.lerobot_v21.reader import read_parquet
from prts_core.data.lerobot_v21.schema import Info
from prts_core.data.validation import laws
from prts_core.data.validation.metadata import Metadata, check_metadata
from prts_core.data.validation.report import Finding, ValidationFailed, ValidationReport
from prts_core.data.validation.tables import check_tables, eager, frame_schema
from prts_core.errors import DataError
from prts_core.progress import track

__all__ = ["Finding", "ValidationFailed", "ValidationReport", "validate_dataset"]


def validate_dataset(
    root: Path, decode_video: bool = True, name: str | None = None, workers: int = 2
) -> ValidationReport:
    """Every finding about the dataset at `root`.

    decode_video: decode every frame; otherwise the first and last of each video. name: how the report calls it.
    """
    report = ValidationReport(name or root.name)
    meta = check_metadata(root, report)
    if meta.info is None:
        return report
    info = meta.info
    for law, found in {
        "totals": laws.law_totals(meta, info),
        "numbering": laws.law_numbering(meta),
        "tasks": laws.law_tasks(meta),
        "splits": laws.law_splits(meta, info),
        "subtasks": laws.law_subtasks(meta),
        "contract": laws.law_contract(meta, info),
    }.items():
        report.checks[law] += 1
        report.findings.extend(found)
    report.findings.extend(check_tables(_tables(root, meta, info, report), frame_schema(info)))
    _check_videos(root, meta, info, report, decode_video, workers)
    return report


def _tables(root: Path, meta: Metadata, info: Info, report: ValidationReport) -> Iterator[tuple[str, pl.DataFrame]]:
    """Read each episode's table once: laws between files here, the caller's pandera on what is yielded."""
    tasks = {row.task_index: row.task for row in meta.tasks}
    stats = {row.episode_index: row for row in meta.stats}
    columns = [key for key, feature in info.features.items() if not feature.is_camera]
    start = 0
    for row in track(meta.episodes, total=len(meta.episodes), what="checking tables"):
        file = info.data_file(row.episode_index)
        report.checks["table values"] += row.length
        try:
            table = read_parquet(root / file)
        except DataError as err:
            found = f"{err.problem}: {err.found or 'no such file'}"
            report.add(Finding("tables", file, found, "a whole parquet file", cure=err.cure or ""))
            start += row.length
            continue
        frame = eager(pl.DataFrame(pl.from_arrow(table.select([key for key in columns if key in table.column_names]))))
        for law, found_ in (
            ("row numbering", laws.law_rows(frame, row, start, info, tasks)),
            ("episode statistics", laws.law_stats(frame, row, stats.get(row.episode_index), info)),
        ):
            report.checks[law] += 1
            report.findings.extend(found_)
        start += row.length
        yield file, frame


def _check_videos(root: Path, meta: Metadata, info: Info, report: ValidationReport, every: bool, workers: int) -> None:
    """Decoding works outside Python's lock, so threads share it; findings keep the order of the files."""
    jobs = [(row, key) for row in meta.episodes for key in info.video_keys]
    report.checks["videos"] += len(jobs)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(lambda job: list(laws.law_video(root, job[0], job[1], info, every)), jobs)
        for findings in track(found, total=len(jobs), what="checking videos"):
            report.findings.extend(findings)
