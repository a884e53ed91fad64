"""Do the statistics that lie in meta/ belong to the data? Compared while the tables are read once, in constant memory.

It knows the three public forms: episodes_stats.jsonl (a line an episode), stats.json (LeRobot, one object a feature)
and norm_stats.json (ours and the public release's). Claimed quantiles are judged by how many rows lie below them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, EpisodeStatsRow, FeatureSummary
from prts_core.data.validation.episode import Facts, Series
from prts_core.data.validation.report import Finding
from prts_core.errors import DataError
from prts_core.files import read_json

EPISODE_STATS = "meta/episodes_stats.jsonl"
STORED = ("meta/stats.json", "meta/norm_stats.json")
QUANTILES = {"q01": 0.01, "q99": 0.99}
RANK_SLACK = 2e-3  # of the rows, and one row: what sketches and other interpolations may be off
_RTOL, _ATOL = 1e-4, 1e-5  # float32 sums of others
_CURE = "compute them again from this data (`prts stats`; lerobot: compute_stats), or remove the file"


@dataclass
class Claim:
    """One feature's statistics as a file claims them, (D,) each, and the rows counted below and up to each quantile."""

    file: str
    feature: str
    values: dict[str, np.ndarray]
    span: range  # episodes that the claim is about
    below: dict[str, np.ndarray] = field(default_factory=dict)
    upto: dict[str, np.ndarray] = field(default_factory=dict)
    averaged: dict[str, np.ndarray] = field(default_factory=dict)  # sums of the episodes' own quantiles

    def watch(self, values: np.ndarray) -> None:
        """Count one episode's rows, (T, D) float64."""
        for name, share in QUANTILES.items():
            claimed = self.values.get(name)
            if claimed is None or claimed.shape != values.shape[1:]:
                continue
            slack = _RTOL * np.abs(claimed) + 1e-9  # files hold float32 or rounded numbers
            own = np.quantile(values, share, axis=0)
            zero = np.zeros(len(claimed))
            self.below[name] = self.below.get(name, zero) + (values < claimed - slack).sum(0)
            self.upto[name] = self.upto.get(name, zero) + (values <= claimed + slack).sum(0)
            self.averaged[name] = self.averaged.get(name, zero) + own


class StoredStatistics:
    """Claims of a dataset's files. `watch` may be called from several threads."""

    def __init__(self, root: Path, splits: Mapping[str, range], episodes: int) -> None:
        self.faults: list[Finding] = []
        self.claims: list[Claim] = []
        self.lock = threading.Lock()
        for file in STORED:
            if (root / file).is_file():
                self._read(root, file, splits, episodes)

    def _read(self, root: Path, file: str, splits: Mapping[str, range], episodes: int) -> None:
        try:
            raw = read_json(root / file)
        except DataError as err:
            self.faults.append(Finding("statistics", file, str(err.found or err.problem), "a JSON file", _CURE))
            return
        stats = raw.get("norm_stats", raw) if isinstance(raw, dict) else None
        if not isinstance(stats, dict):
            self.faults.append(Finding("statistics", file, type(raw).__name__, "an object a feature", _CURE))
            return
        span = splits.get(str(raw.get("split")), range(episodes))
        for feature in (STATE, ACTION):
            claimed = stats.get(feature)
            if isinstance(claimed, dict):
                values = {name: made for name in claimed if (made := _vector(claimed[name])) is not None}
                self.claims.append(Claim(file, feature, values, range(span.start, min(span.stop, episodes))))

    def watch(self, episode: int, feature: str, values: np.ndarray) -> None:
        with self.lock:
            for claim in self.claims:
                if claim.feature == feature and episode in claim.span:
                    claim.watch(values)

    def findings(self, facts: Sequence[Facts]) -> Iterator[Finding]:
        """What the files claim against what the tables hold."""
        yield from self.faults
        for claim in self.claims:
            known = [f.series[claim.feature] for f in facts if claim.feature in f.series and f.episode in claim.span]
            if len(known) == len(claim.span) and known and len({len(series.low) for series in known}) == 1:
                yield from _judge(claim, known)


def _judge(claim: Claim, known: Sequence[Series]) -> Iterator[Finding]:
    rows = sum(series.count for series in known)
    mean = np.sum([series.total for series in known], 0) / rows
    spread = np.sqrt(np.maximum(np.sum([series.squares for series in known], 0) / rows - mean**2, 0))
    low, high = np.min([s.low for s in known], 0), np.max([s.high for s in known], 0)
    for name, ours in {"min": low, "max": high, "mean": mean, "std": spread}.items():
        theirs = claim.values.get(name)
        if theirs is None:
            continue
        slack = 0.01 * spread if name in ("mean", "std") else 0.0  # float32 sums, sample instead of population std
        if theirs.shape != ours.shape or not (np.abs(ours - theirs) <= _ATOL + _RTOL * np.abs(ours) + slack).all():
            yield _stale(claim, f"{name} is not the data's{_worst(ours, theirs)}")
            return
    count = claim.values.get("count")
    if count is not None and int(count.reshape(-1)[0]) != rows:
        yield _stale(claim, f"count {int(count.reshape(-1)[0])}, but the data have {rows} rows")
        return
    for name, share in QUANTILES.items():
        if name not in claim.below:
            continue
        slack = RANK_SLACK * rows + 1
        wrong = (claim.below[name] > share * rows + slack) | (claim.upto[name] < share * rows - slack)
        if wrong.any():
            at = int(wrong.argmax())
            averaged = np.allclose(claim.averaged[name] / len(known), claim.values[name], rtol=1e-3, atol=1e-6)
            rank = (
                f"{name}[{at}] = {claim.values[name][at]:.4g} has {claim.upto[name][at] / rows:.2%} of the rows below"
            )
            why = ": the mean of the episodes' quantiles, which is no quantile" if averaged else ""
            yield Finding(
                "statistics", claim.file, f"{claim.feature}: {rank}{why}", f"{share:.0%}", _CURE, severity="warning"
            )
            return


def _stale(claim: Claim, found: str) -> Finding:
    return Finding(
        "statistics", claim.file, f"{claim.feature}: {found}", "statistics of this data", _CURE, severity="warning"
    )


def _worst(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        return f": {theirs.shape} against {ours.shape}"
    at = int(np.abs(ours - theirs).argmax())
    return f": dimension {at} is {theirs[at]:.6g}, the data say {ours[at]:.6g}"


def _vector(raw: Any) -> np.ndarray | None:
    """A claimed list as a flat float array; None for what is none."""
    try:
        return np.array(raw, np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        return None


def law_episode_stats(row: EpisodeRow, stats: EpisodeStatsRow | None, facts: Facts) -> Iterator[Finding]:
    """episodes_stats.jsonl has the episode (else an error), and its numbers are those of the table (else a warning)."""
    if stats is None:
        yield Finding(
            "episode statistics", EPISODE_STATS, f"no line for episode {row.episode_index}", "one line per episode",
            "prts validate FOLDER --fix OUT writes it",
        )  # fmt: skip
        return
    for key, series in facts.series.items():
        claimed = stats.stats.get(key)
        wrong = None if claimed is None else _contradiction(claimed, series)
        if wrong is not None:
            yield Finding(
                "episode statistics", EPISODE_STATS, f"{key}.{wrong} of episode {row.episode_index} is not the table's",
                "statistics of the data", "prts validate FOLDER --fix OUT writes them again", severity="warning",
            )  # fmt: skip


def _contradiction(claimed: FeatureSummary, series: Series) -> str | None:
    """The first statistic that does not fit."""
    if claimed.count[0] != series.count:
        return "count"
    for name, ours in (("min", series.low), ("max", series.high), ("mean", series.mean), ("std", series.std)):
        theirs = _vector(getattr(claimed, name))
        slack = 0.01 * series.std if name in ("mean", "std") else 0.0
        if theirs is None or theirs.shape != ours.shape:
            return name
        if not (np.abs(ours - theirs) <= _ATOL + _RTOL * np.abs(ours) + slack).all():
            return name
    return None
