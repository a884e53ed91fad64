"""Check a LeRobot v2.1 dataset whole: its seal, tables by pandera, metadata by pydantic, laws between files, physics.

`validate_dataset` never stops at the first fault and changes nothing on disk. Episodes are read once, by several
threads, and only a few numbers of each are kept. What repairs is `repair.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import polars as pl
import pyarrow as pa

from prts_core.data.ahead import in_order
from prts_core.data.lerobot_v21.reader import read_parquet
from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, Info
from prts_core.data.lerobot_v21.seal import SEAL, compare, read_seal
from prts_core.data.validation.episode import EpisodeSummary, facts, vectors
from prts_core.data.validation.laws import LAWS, law_rows
from prts_core.data.validation.metadata import Metadata, check_metadata
from prts_core.data.validation.physics import check_physics
from prts_core.data.validation.report import Finding, Severity, ValidationFailed, ValidationReport
from prts_core.data.validation.stored_statistics import Accumulator, StoredStatistics, law_episode_stats
from prts_core.data.validation.tables import check_tables, frame_schema, framed, law_stills
from prts_core.data.validation.videos import Depth, law_video
from prts_core.io.errors import DataError
from prts_core.io.files import digest_file
from prts_core.io.progress import track

__all__ = ["Depth", "Finding", "ValidationFailed", "ValidationReport", "validate_dataset"]


def validate_dataset(
    root: Path,
    video: Depth = "every",
    name: str | None = None,
    workers: int = 2,
    foreign: bool = False,
    sealed: bool = True,
    statistics: Sequence[Path] = (),
) -> ValidationReport:
    """Every finding about the dataset at `root`.

    video: how much of each video is decoded. name: how the report calls the dataset. foreign: others wrote it, so that
    a missing Contract only warns. sealed: compare with the seal, or warn that there is none. statistics: files, or
    folders of files, that must be this dataset's, besides those in its meta/.
    """
    if not root.is_dir():
        raise DataError("A dataset folder is missing", file=root, expected="a LeRobot v2.1 folder with meta/info.json")
    report = ValidationReport(name or root.resolve().name)
    meta = check_metadata(root, report, foreign)
    if meta.info is not None:
        for law, check in LAWS.items():
            report.checks[law] += 1
            report.findings.extend(check(meta, meta.info))
        stored = StoredStatistics(root, meta.info, meta.contract, len(meta.episodes), statistics)
        known: list[EpisodeSummary] = []
        tables = _tables(root, meta, meta.info, report, stored, known, video, workers)
        report.findings.extend(check_tables(tables, frame_schema(meta.info)))
        report.checks["statistics"] += len(stored)
        report.findings.extend(stored.findings())
        report.checks["physics"] += len(known)
        report.findings.extend(check_physics(known, meta.contract, meta.info))
        report.findings.extend(_videos(root, meta, meta.info, report, video, known, workers))
    if sealed:  # last: what else is known of a changed file says more than its digest
        report.findings.extend(_seal(root, report, workers))
    return report


def check_episode(
    root: Path, table: pa.Table, row: EpisodeRow, first: int, info: Info, tasks: dict[int, str], video: Depth
) -> tuple[list[Finding], pl.DataFrame]:
    """What its laws and pictures say of one episode's table, and the frame for pandera. DataError: columns of an
    unknown kind. first: rows of all episodes before it."""
    frame = framed(table, info, root / info.data_file(row.episode_index))
    return [*law_rows(table, row, first, info, tasks), *law_stills(table, row, info, video)], frame


@dataclass(frozen=True)
class _Checked:
    """One episode's table after its reader thread: findings, and a frame for pandera where it could be read."""

    findings: list[Finding]
    frame: pl.DataFrame | None = None
    facts: EpisodeSummary | None = None
    seen: list[Accumulator | None] = field(default_factory=list)
    digest: str | None = None


def _tables(
    root: Path,
    meta: Metadata,
    info: Info,
    report: ValidationReport,
    stored: StoredStatistics,
    known: list[EpisodeSummary],
    video: Depth,
    workers: int,
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Read each episode's table once: laws between files here, the caller's pandera on what is yielded."""
    tasks = {row.task_index: row.task for row in meta.tasks}
    stats = {row.episode_index: row for row in meta.stats}

    def read(job: tuple[EpisodeRow, int]) -> _Checked:
        row, first = job
        file = info.data_file(row.episode_index)
        try:
            table = read_parquet(root / file)
            found, frame = check_episode(root, table, row, first, info, tasks, video)
        except DataError as err:
            cure = err.cure or "restore it from its source, or convert again"
            reason = f"{err.problem}: {err.found or 'no such file'}"
            return _Checked([Finding("tables", file, reason, "a whole parquet file", cure)])
        summary = facts(table, row.episode_index, info, root / file, meta.contract)
        found += law_episode_stats(row, stats.get(row.episode_index), summary)
        values = {key: vectors(table, key, root / file) for key in (STATE, ACTION)} if stored.claims else {}
        seen = stored.watch(row.episode_index, {key: v for key, v in values.items() if v is not None})
        return _Checked(found, frame, summary, seen, digest_file(root / file) if stored.provenances else None)

    starts = accumulate((row.length for row in meta.episodes), initial=0)
    jobs = list(zip(meta.episodes, starts, strict=False))
    done = in_order(read, jobs, workers, 4)
    for (row, _), checked in zip(jobs, track(done, total=len(jobs), what="checking tables"), strict=True):
        report.checks["table values"] += row.length
        report.findings.extend(checked.findings)
        if checked.frame is not None and checked.facts is not None:
            report.checks["row numbering"] += 1
            report.checks["episode statistics"] += 1
            known.append(checked.facts)
            stored.take(row.episode_index, checked.seen, checked.digest)
            yield info.data_file(row.episode_index), checked.frame


def _videos(
    root: Path,
    meta: Metadata,
    info: Info,
    report: ValidationReport,
    depth: Depth,
    known: list[EpisodeSummary],
    workers: int,
) -> Iterator[Finding]:
    motion = {found.episode: found.motion for found in known if len(found.motion)}
    jobs = [(row, key) for row in meta.episodes for key in info.video_keys]
    report.checks["videos"] += len(jobs)

    def check(job: tuple[EpisodeRow, str]) -> list[Finding]:
        return list(law_video(root, *job, info, depth, motion.get(job[0].episode_index)))

    for findings in track(in_order(check, jobs, workers, 4), total=len(jobs), what="checking videos"):
        yield from findings


def _seal(root: Path, report: ValidationReport, workers: int) -> Iterator[Finding]:
    """Every byte against meta/prts_manifest.json; a dataset without one is readable at best, not verified."""
    reseal = "restore the file from its source; if the change is meant: prts validate FOLDER --seal"
    try:
        sealed = read_seal(root)
    except DataError as err:
        yield Finding("seal", SEAL, str(err.found or err.problem), str(err.expected or "a manifest"), reseal)
        return
    if sealed is None:
        found, cure = "content unverified: the dataset is not sealed", "when you trust this copy: prts validate FOLDER"
        yield Finding("seal", SEAL, found, "size and SHA-256 of every file", f"{cure} --seal", severity="warning")
        return
    report.checks["seal"] += len(sealed)
    for one in compare(root, sealed, workers):
        severity: Severity = "warning" if one.fault == "unlisted" else "error"
        yield Finding("seal", one.path, one.found, one.expected, reseal, severity=severity)
