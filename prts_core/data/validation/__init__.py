"""Check a LeRobot dataset whole: its seal, tables by pandera, metadata by pydantic, laws between files, physics.

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
from prts_core.data.lerobot_v21.frames import VideoPool
from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, EpisodeStatsRow, Info
from prts_core.data.lerobot_v21.seal import SEAL, compare, read_seal
from prts_core.data.lerobot_v21.tables import read_parquet
from prts_core.data.statistics import table_digest
from prts_core.data.validation.episode import EpisodeSummary, summarize, vectors
from prts_core.data.validation.laws import LAWS, law_rows
from prts_core.data.validation.metadata import Metadata, check_metadata
from prts_core.data.validation.physics import check_physics
from prts_core.data.validation.report import Finding, Severity, ValidationFailed, ValidationReport
from prts_core.data.validation.stored_statistics import Accumulator, StoredStatistics, law_episode_stats
from prts_core.data.validation.tables import check_tables, frame_schema, framed, law_stills
from prts_core.data.validation.videos import Depth, law_clip, law_video
from prts_core.io.errors import DataError, PrtsError
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
        raise DataError("A dataset folder is missing", file=root, expected="a LeRobot folder with meta/info.json")
    report = ValidationReport(name or root.resolve().name)
    meta = check_metadata(root, report, foreign)
    if meta.info is not None:
        for law, check in LAWS.items():
            report.checks[law] += 1
            report.findings.extend(check(meta, meta.info))
        stored = StoredStatistics(root, meta.info, meta.contract, len(meta.episodes), statistics)
        content = _Content(root, meta, meta.info, report, stored, video, workers)
        report.findings.extend(check_tables(content.tables(), frame_schema(meta.info)))
        report.checks["statistics"] += len(stored)
        report.findings.extend(stored.findings())
        report.checks["physics"] += len(content.known)
        report.findings.extend(check_physics(content.known, meta.contract, meta.info))
        report.findings.extend(content.videos())
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
    summary: EpisodeSummary | None = None
    seen: list[Accumulator | None] = field(default_factory=list)
    digest: str | None = None


@dataclass
class _Content:
    """One pass over the episodes. known: summaries of those whose table could be read."""

    root: Path
    meta: Metadata
    info: Info
    report: ValidationReport
    stored: StoredStatistics
    video: Depth
    workers: int
    known: list[EpisodeSummary] = field(default_factory=list)

    def tables(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """Read each episode's table once: laws between files here, the caller's pandera on what is yielded."""
        starts = accumulate((row.length for row in self.meta.episodes), initial=0)
        jobs = list(zip(self.meta.episodes, starts, strict=False))
        tasks = {row.task_index: row.task for row in self.meta.tasks}
        stats = {row.episode_index: row for row in self.meta.stats}
        done = in_order(lambda job: self._read(*job, tasks, stats), jobs, self.workers, 4)
        for (row, _), checked in zip(jobs, track(done, total=len(jobs), what="checking tables"), strict=True):
            self.report.checks["table values"] += row.length
            self.report.findings.extend(checked.findings)
            if checked.frame is not None and checked.summary is not None:
                self.report.checks["row numbering"] += 1
                self.report.checks["episode statistics"] += 1
                self.known.append(checked.summary)
                self.stored.take(row.episode_index, checked.seen, checked.digest)
                yield self.info.data_name(row.episode_index), checked.frame

    def _read(self, row: EpisodeRow, first: int, tasks: dict[int, str], stats: dict[int, EpisodeStatsRow]) -> _Checked:
        file = self.info.data_name(row.episode_index)
        try:
            path = self.meta.path(self.root, self.info.data_file(row.episode_index))
            table = read_parquet(path, None, self.info.data_rows(row.episode_index))
            found, frame = check_episode(self.root, table, row, first, self.info, tasks, self.video)
        except PrtsError as err:
            cure = err.cure or "restore it from its source, or convert again"
            reason = f"{err.problem}: {err.found or 'no such file'}"
            return _Checked([Finding("tables", file, reason, "a whole parquet file", cure)])
        summary = summarize(table, row.episode_index, self.info, path, self.meta.contract)
        file = self.info.tables["episodes_stats"]
        found += law_episode_stats(row, stats.get(row.episode_index), summary, file)
        values = {key: vectors(table, key, path) for key in (STATE, ACTION)} if self.stored.claims else {}
        seen = self.stored.watch(row.episode_index, {key: v for key, v in values.items() if v is not None})
        return _Checked(found, frame, summary, seen, table_digest(path) if self.stored.provenances else None)

    def videos(self) -> Iterator[Finding]:
        motion = {summary.episode: summary.motion for summary in self.known if len(summary.motion)}
        jobs = [(row, key) for key in self.info.video_keys for row in self.meta.episodes]
        self.report.checks["videos"] += len(jobs)

        pool = VideoPool(self.workers, self.info.fps)  # of long files, opened once for all their episodes

        def check(job: tuple[EpisodeRow, str]) -> list[Finding]:
            seen = motion.get(job[0].episode_index)
            try:
                path = self.meta.path(self.root, self.info.video_file(job[0].episode_index, job[1]))
            except PrtsError as err:
                file, found = self.info.video_name(job[0].episode_index, job[1]), f"{err.problem}: {err.found}"
                return [Finding("videos", file, found, "a whole video", err.cure or "restore it from its source")]
            if self.info.first_frame(job[0].episode_index, job[1]) is None:
                return list(law_video(path, *job, self.info, self.video, seen))
            return list(law_clip(path, *job, self.info, self.video, pool, seen))

        for findings in track(in_order(check, jobs, self.workers, 4), total=len(jobs), what="checking videos"):
            yield from findings
        pool.close()


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
