"""Compare the statistics that were computed from a dataset with its tables, while these are read once.

Forms that lie in meta/ or are named beside it: LeRobot's stats.json, norm_stats.json (ours, with a
fingerprint, the public release's, openpi's), state_relative_ck<chunk>_norm_stats.json, the release's statistics.json,
and episodes_stats.jsonl (a line an episode). How a claim is judged is in `claims`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import Contract
from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, EpisodeStatsRow, Info
from prts_core.data.statistics import differences
from prts_core.data.validation.claims import CURE, Accumulator, StoredStatistic
from prts_core.data.validation.episode import EpisodeSummary
from prts_core.data.validation.report import Finding
from prts_core.io.errors import DataError
from prts_core.io.files import digest_value, read_json

EPISODE_STATS = "meta/episodes_stats.jsonl"
NAMES = re.compile(r"(stats|statistics|norm_stats|state_relative_ck\d+_norm_stats)\.json")
OPENPI = {"state": STATE, "actions": ACTION}


@dataclass(frozen=True)
class StatisticsProvenance:
    """What a file of ours says it was made from. name: as findings call the file."""

    name: str
    made_from: dict[str, Any]
    fingerprint: str
    split: str
    chunk: int | None  # that its name says

    @staticmethod
    def of(raw: object, name: str) -> StatisticsProvenance | None:
        """None where the file has no fingerprint of ours."""
        if not isinstance(raw, dict) or not isinstance(raw.get("made_from"), dict):
            return None
        return StatisticsProvenance(
            name, raw["made_from"], str(raw.get("fingerprint")), str(raw.get("split")), _chunk(name)
        )

    def findings(
        self, splits: Mapping[str, range], digests: Mapping[int, str], contract: Contract | None
    ) -> Iterator[Finding]:
        """Stale, edited, or of a split that is not there. digests: episode -> SHA-256 of its table."""
        if digest_value(self.made_from) != self.fingerprint:
            said = "its fingerprint is not that of what it says it was made from: the file was edited"
            yield Finding("statistics", self.name, said, "fingerprint of made_from", CURE)
            return
        span = splits.get(self.split)
        if span is None:
            yield Finding("statistics", self.name, f"split {self.split!r}", f"one of {', '.join(splits)}", CURE)
            return
        length = self.made_from.get("chunk_length")
        if self.chunk is not None and length != self.chunk:
            yield Finding("statistics", self.name, f"chunk_length {length}", f"{self.chunk}, as its name says", CURE)
            return
        if contract is None or not all(episode in digests for episode in span):
            return  # a finding of the Contract or the tables already
        wanted_length = length if any(contract.relative) else None
        stale = differences(self.made_from, [digests[episode] for episode in span], contract, self.split, wanted_length)
        if stale:
            said = "; ".join(f"{name} {found}" for name, found, _ in stale)
            expected = "; ".join(f"{name} {wanted}" for name, _, wanted in stale)
            yield Finding("statistics", self.name, f"stale, computed from something else: {said}", expected, CURE)


class StoredStatistics:
    """Claims of the files of a dataset and of `others`: statistics files, or folders that hold some."""

    def __init__(
        self, root: Path, info: Info, contract: Contract | None, episodes: int, others: Sequence[Path] = ()
    ) -> None:
        self.contract = contract
        self.splits = {
            name: range(span.start, max(span.start, min(span.stop, episodes)))
            for name, span in info.split_ranges.items()
        }
        self.whole = range(episodes)
        self.faults: list[Finding] = []
        self.claims: list[StoredStatistic] = []
        self.made: list[StatisticsProvenance] = []
        self.digests: dict[int, str] = {}
        files = {path: f"meta/{path.name}" for path in _files(root / "meta", deep=False)}
        for other in others:
            if not other.exists():
                raise DataError("Statistics to compare are missing", file=other, cure="run `prts stats`")
            files |= {path: str(path) for path in ([other] if other.is_file() else _files(other, deep=True))}
        for path, name in files.items():
            self._read(path, name)

    def __len__(self) -> int:
        return len(self.claims) + len(self.made)

    def watch(self, episode: int, found: Mapping[str, np.ndarray]) -> list[Accumulator | None]:
        """What `take` takes; found: sound (T, D) arrays by feature. Threads may call it."""
        return [claim.watch(episode, found) for claim in self.claims]

    def take(self, episode: int, seen: Sequence[Accumulator | None], digest: str | None) -> None:
        """In the order of the episodes. digest: SHA-256 of the table, where `made` asks for it."""
        for claim, tally in zip(self.claims, seen, strict=True):
            if tally is not None:
                claim.take(episode, tally)
        if digest is not None:
            self.digests[episode] = digest

    def findings(self) -> Iterator[Finding]:
        """What the files claim against what the tables hold; of a stale file only that."""
        yield from self.faults
        stale = set()
        for made in self.made:
            for finding in made.findings(self.splits, self.digests, self.contract):
                stale.add(made.name)
                yield finding
        for claim in self.claims:
            found = None if claim.file in stale else claim.finding()
            if found is not None:
                yield found

    # ---- the forms ---------------------------------------------------------------------------------------------------
    def _read(self, path: Path, name: str) -> None:
        try:
            raw = read_json(path)
        except DataError as err:
            self.faults.append(Finding("statistics", name, str(err.found or err.problem), "a JSON file", CURE))
            return
        if not isinstance(raw, dict):
            self.faults.append(Finding("statistics", name, type(raw).__name__, "an object a feature", CURE))
            return
        chunk = _chunk(name)
        made = StatisticsProvenance.of(raw, name)
        if made is not None:
            self.made.append(made)
            stated = made.made_from.get("chunk_length")
            chunk = stated if type(stated) is int and stated > 0 else chunk
        split = str(raw.get("split"))
        spans = [self.splits[split]] if split in self.splits else self._spans()
        stats = raw.get("norm_stats", raw)
        trained = False  # relative actions in it, of chunks that nobody names
        if "state_mode" in raw or isinstance(raw.get("datasets"), dict):
            stats, trained = _released(raw), True
        if isinstance(stats, dict) and set(OPENPI) <= set(stats):
            stats, trained = {ours: stats[theirs] for theirs, ours in OPENPI.items()}, True
        if not isinstance(stats, dict):
            self.faults.append(Finding("statistics", name, type(stats).__name__, "an object a feature", CURE))
            return
        for feature in (STATE, ACTION):
            if not isinstance(stats.get(feature), dict):
                continue
            listed = stats[feature]
            values = {key: vector for key in listed if (vector := _vector(listed[key])) is not None}
            counted = values.pop("count", _vector(raw.get("count")))
            count = int(counted[0]) if counted is not None and len(counted) and np.isfinite(counted[0]) else None
            for dims, steps in self._parts(feature, chunk, trained):
                self.claims.append(
                    StoredStatistic(name, feature, values, list(spans), dims, steps, count, made is not None)
                )

    def _spans(self) -> list[range]:
        """What statistics that name no split may be of."""
        return list(dict.fromkeys([self.whole, *self.splits.values()]))

    def _parts(self, feature: str, chunk: int | None, trained: bool) -> Iterator[tuple[np.ndarray | None, int | None]]:
        """(dimensions, chunk length) that can be judged: actions may be relative, which the Contract says."""
        if feature == STATE or (chunk is None and not trained):
            yield None, None
            return
        marks = np.array(self.contract.relative if self.contract else (), bool)
        if self.contract is None or (chunk is not None and not marks.any()):
            return  # which dimensions are relative is not known
        yield (np.flatnonzero(~marks) if marks.any() else None), None
        if chunk is not None:
            yield np.flatnonzero(marks), chunk


def _chunk(name: str) -> int | None:
    found = re.search(r"state_relative_ck(\d+)_norm_stats\.json$", name)
    return int(found[1]) if found else None


def _files(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*.json") if deep else folder.glob("*.json")
    return sorted(path for path in found if path.is_file() and NAMES.fullmatch(path.name))


def _released(raw: dict[str, Any]) -> object:
    """The statistics of a release's statistics.json; of several datasets none: which is meant is not said."""
    datasets = raw.get("datasets")
    if isinstance(datasets, dict) and datasets:
        only = next(iter(datasets.values()))
        return only.get("stats") if len(datasets) == 1 and isinstance(only, dict) else {}
    return raw.get("stats")


def _vector(raw: Any) -> np.ndarray | None:
    """A claimed list as a flat float array; None for what is none."""
    try:
        return np.array(raw, np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        return None


def law_episode_stats(row: EpisodeRow, stats: EpisodeStatsRow | None, facts: EpisodeSummary) -> Iterator[Finding]:
    """episodes_stats.jsonl has the episode (else an error), and its numbers are those of the table (else a warning)."""
    check, fix = "episode statistics", "prts validate FOLDER --fix OUT writes"
    if stats is None:
        found = f"no line for episode {row.episode_index}"
        yield Finding(check, EPISODE_STATS, found, "one line per episode", f"{fix} it")
        return
    for key, series in facts.series.items():
        if key not in stats.stats:
            continue
        claimed = stats.stats[key].model_dump()
        wrong = series.contradiction({name: _vector(claimed[name]) for name in ("min", "max", "mean", "std")})
        name = "count" if claimed["count"][0] != series.rows else wrong[0] if wrong else None
        if name is not None:
            found = f"{key}.{name} of episode {row.episode_index} is not the table's"
            cure = f"{fix} them again"
            yield Finding(check, EPISODE_STATS, found, "statistics of the data", cure, severity="warning")
