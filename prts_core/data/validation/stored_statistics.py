"""Compare the statistics that were computed from a dataset with its tables, while these are read once.

Forms that lie in meta/ or are named beside it: LeRobot's stats.json, norm_stats.json (ours, with a fingerprint, the
public release's, openpi's), state_relative_ck<chunk>_norm_stats.json, the release's statistics.json, and
episodes_stats.jsonl (a line an episode). Rows are summed up episode by episode in constant memory; whether a quantile
is right is judged by how many rows lie below it, because it may come from a sketch or another interpolation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import Contract
from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, EpisodeStatsRow, Info
from prts_core.data.statistics import LEROBOT_QUANTILES, differences
from prts_core.data.validation.episode import ATOL, RTOL, EpisodeSummary, Moments
from prts_core.data.validation.report import Finding, Severity
from prts_core.io.errors import DataError
from prts_core.io.files import digest_value, read_json

EPISODE_STATS = "meta/episodes_stats.jsonl"
NAMES = re.compile(r"(stats|statistics|norm_stats|state_relative_ck\d+_norm_stats)\.json")
OPENPI = {"state": STATE, "actions": ACTION}
RANK_SLACK = 2e-3  # of the rows, and one row: what sketches and other interpolations may be off
CURE = "compute them again from this data (`prts stats`; lerobot: compute_stats), or remove the file"


# ---- one feature's statistics as a file claims them ----------------------------------------------------------------
@dataclass(kw_only=True)
class Accumulator(Moments):
    """Rows summed up, and for each claimed quantile the sums over episodes {name: (3, D)} of the rows below it, the
    rows up to it, and the episode's own quantile, to recognise who averaged them."""

    episodes: int = 1
    ranks: dict[str, np.ndarray]

    @staticmethod
    def summed(values: np.ndarray, claimed: Mapping[str, np.ndarray]) -> Accumulator:
        """Of one episode's (n, D) rows."""
        ranks = {}
        for name, share in LEROBOT_QUANTILES.items():
            if name in claimed and claimed[name].shape == values.shape[1:]:
                slack = RTOL * np.abs(claimed[name]) + 1e-9  # files hold float32 or rounded numbers
                below, upto = (values < claimed[name] - slack).sum(0), (values <= claimed[name] + slack).sum(0)
                ranks[name] = np.stack([below, upto, np.quantile(values, share, axis=0)])
        return Accumulator.of(values, ranks=ranks)

    def __add__(self, other: Accumulator) -> Accumulator:
        """Of both's rows; `self` where the widths differ."""
        if self.low.shape != other.low.shape:
            return self
        return Accumulator(
            rows=self.rows + other.rows,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            total=self.total + other.total,
            squares=self.squares + other.squares,
            episodes=self.episodes + other.episodes,
            ranks={name: self.ranks[name] + part for name, part in other.ranks.items()},
        )


@dataclass
class StoredStatistic:
    """values: name -> (D,), of the dimensions judged. spans: the episodes it may be about; true of one of them is true.

    dims: which dimensions these are, none: all. chunk: these are of a[t + h] - s[t], h < chunk. count: rows it claims
    to be of, where it says so. exact: this project wrote it, so that a contradiction is an error.
    """

    file: str
    feature: str
    values: dict[str, np.ndarray]
    spans: list[range]
    dims: np.ndarray | None = None
    chunk: int | None = None
    count: int | None = None
    exact: bool = False
    wholes: dict[int, Accumulator] = field(default_factory=dict)  # of a span, by its place

    def watch(self, episode: int, found: Mapping[str, np.ndarray]) -> Accumulator | None:
        """One episode's rows summed up; found: (T, D) by feature. Changes nothing, so that threads may call it."""
        values = found.get(self.feature)
        if values is None or not any(episode in span for span in self.spans):
            return None
        if self.dims is not None and (not len(self.dims) or self.dims.max() >= values.shape[1]):
            return None
        if self.chunk is not None:
            values = chunks(values, found.get(STATE), self.dims, self.chunk)
        elif self.dims is not None:
            values = values[:, self.dims]
        return None if values is None else Accumulator.summed(values, self.values)

    def take(self, episode: int, tally: Accumulator) -> None:
        """Add what `watch` made; in the order of the episodes, so that sums round alike."""
        for place, span in enumerate(self.spans):
            if episode in span:
                self.wholes[place] = self.wholes[place] + tally if place in self.wholes else tally

    def finding(self) -> Finding | None:
        """Where the claim is true of no span that was read whole: the finding of the span it fits best."""
        whole = [tally for place, tally in self.wholes.items() if tally.episodes == len(self.spans[place])]
        return max(map(self._judge, whole), key=lambda one: one[0], default=(0, None))[1]

    def _judge(self, tally: Accumulator) -> tuple[int, Finding | None]:
        """(how many statistics are true before the first that is not, that one)."""
        claimed = self.values
        wrong = tally.contradiction(claimed)
        if wrong is not None:
            name, ours = wrong
            order = ["min", "max", "mean", "std"]
            found = f"{name} is not the data's{self._worst(ours, claimed[name])}"
            return order.index(name), self._finding(found, "statistics of this data")
        if self.count and self.chunk is None and self.count != tally.rows:
            found = f"count {self.count}, but the data have {tally.rows} rows"
            return 4, self._finding(found, "statistics of this data")
        for passed, (name, (below, upto, summed)) in enumerate(tally.ranks.items(), 4):
            share, slack = LEROBOT_QUANTILES[name], RANK_SLACK * tally.rows + 1
            edge = ATOL + RTOL * np.abs(claimed[name])
            off = (below > share * tally.rows + slack) | (upto < share * tally.rows - slack)
            off |= (claimed[name] < tally.low - edge) | (claimed[name] > tally.high + edge)
            if off.any():
                at = int(off.argmax())
                averaged = np.allclose(summed / tally.episodes, claimed[name], rtol=1e-3, atol=1e-6)
                why = ": the mean of the episodes' quantiles, which is no quantile" if averaged else ""
                rank = upto[at] / tally.rows
                found = f"{name}[{self._dimension(at)}] = {claimed[name][at]:.4g} has {rank:.2%} of the rows below{why}"
                return passed, self._finding(found, f"{share:.0%}")
        return len(self.values) + 5, None

    def _dimension(self, at: int) -> int:
        return at if self.dims is None else int(self.dims[at])

    def _finding(self, found: str, expected: str) -> Finding:
        severity: Severity = "error" if self.exact else "warning"
        of = self.feature if self.chunk is None else f"{self.feature}, state-relative chunks of {self.chunk}"
        return Finding("statistics", self.file, f"{of}: {found}", expected, CURE, severity=severity)

    def _worst(self, ours: np.ndarray, theirs: np.ndarray) -> str:
        if ours.shape != theirs.shape:
            return f": {theirs.shape} against {ours.shape}"
        at = int(np.abs(ours - theirs).argmax())
        return f": dimension {self._dimension(at)} is {theirs[at]:.6g}, the data say {ours[at]:.6g}"


def chunks(action: np.ndarray, state: np.ndarray | None, dims: np.ndarray | None, length: int) -> np.ndarray | None:
    """(pairs, len(dims)) float32: a[t + h] - s[t] of every row t and step h < length that the episode has."""
    if state is None or dims is None or dims.max() >= state.shape[1] or len(state) != len(action):
        return None
    ahead, now = action[:, dims].astype(np.float32), state[:, dims].astype(np.float32)
    return np.concatenate([ahead[h:] - now[: len(now) - h] for h in range(min(length, len(now)))])


# ---- files ---------------------------------------------------------------------------------------------------------
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
            found = "its fingerprint is not that of what it says it was made from: the file was edited"
            yield Finding("statistics", self.name, found, "fingerprint of made_from", CURE)
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
            found = "; ".join(f"{name} {value}" for name, value, _ in stale)
            expected = "; ".join(f"{name} {wanted}" for name, _, wanted in stale)
            yield Finding("statistics", self.name, f"stale, computed from something else: {found}", expected, CURE)


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
        self.provenances: list[StatisticsProvenance] = []
        self.digests: dict[int, str] = {}
        files = {path: f"meta/{path.name}" for path in _files(root / "meta", deep=False)}
        for other in others:
            if not other.exists():
                raise DataError("Statistics to compare are missing", file=other, cure="run `prts stats`")
            files |= {path: str(path) for path in ([other] if other.is_file() else _files(other, deep=True))}
        for path, name in files.items():
            self._read(path, name)

    def __len__(self) -> int:
        return len(self.claims) + len(self.provenances)

    def watch(self, episode: int, found: Mapping[str, np.ndarray]) -> list[Accumulator | None]:
        """What `take` takes; found: sound (T, D) arrays by feature. Threads may call it."""
        return [claim.watch(episode, found) for claim in self.claims]

    def take(self, episode: int, seen: Sequence[Accumulator | None], digest: str | None) -> None:
        """In the order of the episodes. digest: SHA-256 of the table, where `provenances` ask for it."""
        for claim, tally in zip(self.claims, seen, strict=True):
            if tally is not None:
                claim.take(episode, tally)
        if digest is not None:
            self.digests[episode] = digest

    def findings(self) -> Iterator[Finding]:
        """What the files claim against what the tables hold; of a stale file only that."""
        yield from self.faults
        stale = set()
        for provenance in self.provenances:
            for finding in provenance.findings(self.splits, self.digests, self.contract):
                stale.add(provenance.name)
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
        provenance = StatisticsProvenance.of(raw, name)
        if provenance is not None:
            self.provenances.append(provenance)
            stated = provenance.made_from.get("chunk_length")
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
                # of another width: as it is, so that the widths show
                fits = [dims is not None and len(dims) > 0 and dims.max() < len(vector) for vector in values.values()]
                judged = {n: v[dims] if fit else v for (n, v), fit in zip(values.items(), fits, strict=True)}
                known = provenance is not None
                self.claims.append(StoredStatistic(name, feature, judged, list(spans), dims, steps, count, known))

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


def law_episode_stats(
    row: EpisodeRow, stats: EpisodeStatsRow | None, facts: EpisodeSummary, file: str = EPISODE_STATS
) -> Iterator[Finding]:
    """The file has the episode (else an error), and its numbers are those of the table (else a warning)."""
    check, fix = "episode statistics", "prts validate FOLDER --fix OUT writes"
    if stats is None:
        found = f"no line for episode {row.episode_index}"
        yield Finding(check, file, found, "one line per episode", f"{fix} it")
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
            yield Finding(check, file, found, "statistics of the data", cure, severity="warning")
