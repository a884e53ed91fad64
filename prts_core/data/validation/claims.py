"""One feature's statistics as a file claims them, held against the rows: moments and range, and quantiles by rank.

Rows are summed up episode by episode in constant memory; whether a quantile is right is judged by how many rows lie
below it, because it may come from a sketch or another interpolation. It knows no file form (`stored_statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from prts_core.data.lerobot_v21.schema import STATE
from prts_core.data.validation.report import Finding, Severity

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
RANK_SLACK = 2e-3  # of the rows, and one row: what sketches and other interpolations may be off
RTOL, ATOL = 1e-4, 1e-5  # float32 sums of others
CURE = "compute them again from this data (`prts stats`; lerobot: compute_stats), or remove the file"


@dataclass
class Accumulator:
    """What is kept of rows (n, D): sums and range, and for each claimed quantile the rows below and up to it.

    averaged: the sum of the episodes' own quantiles, to recognise who averaged them.
    """

    episodes: int = 0
    rows: int = 0
    low: np.ndarray = field(default_factory=lambda: np.array(np.inf))
    high: np.ndarray = field(default_factory=lambda: np.array(-np.inf))
    total: np.ndarray = field(default_factory=lambda: np.array(0.0))
    squares: np.ndarray = field(default_factory=lambda: np.array(0.0))
    below: dict[str, np.ndarray] = field(default_factory=dict)
    upto: dict[str, np.ndarray] = field(default_factory=dict)
    averaged: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def of(values: np.ndarray, claimed: Mapping[str, np.ndarray]) -> Accumulator:
        """Of one episode's (n, D) rows."""
        made = Accumulator(
            1,
            len(values),
            values.min(0).astype(np.float64),
            values.max(0).astype(np.float64),
            values.sum(0, dtype=np.float64),
            np.einsum("ij,ij->j", values, values, dtype=np.float64),
        )
        for name, share in QUANTILES.items():
            if name in claimed and claimed[name].shape == values.shape[1:]:
                slack = RTOL * np.abs(claimed[name]) + 1e-9  # files hold float32 or rounded numbers
                made.below[name] = (values < claimed[name] - slack).sum(0)
                made.upto[name] = (values <= claimed[name] + slack).sum(0)
                made.averaged[name] = np.quantile(values, share, axis=0)
        return made

    def add(self, other: Accumulator) -> bool:
        """False, and nothing is added, where the widths differ."""
        if self.episodes and self.low.shape != other.low.shape:
            return False
        self.episodes, self.rows = self.episodes + other.episodes, self.rows + other.rows
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        for name in other.below:
            for ours, theirs in (
                (self.below, other.below),
                (self.upto, other.upto),
                (self.averaged, other.averaged),
            ):
                ours[name] = ours.get(name, 0) + theirs[name]
        return True


@dataclass
class StoredStatistic:
    """values: name -> (D,). spans: the episodes it may be about; true of one of them is true.

    dims: the dimensions judged, none: all. chunk: these are of a[t + h] - s[t], h < chunk. count: rows it claims to be
    of, where it says so. exact: this project wrote it, so that a contradiction is an error.
    """

    file: str
    feature: str
    values: dict[str, np.ndarray]
    spans: list[range]
    dims: np.ndarray | None = None
    chunk: int | None = None
    count: int | None = None
    exact: bool = False
    tallies: list[Accumulator] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tallies = [Accumulator() for _ in self.spans]

    def watch(self, episode: int, found: Mapping[str, np.ndarray]) -> Accumulator | None:
        """One episode's rows summed up; found: (T, D) by feature. Changes nothing, so that threads may call it."""
        values = found.get(self.feature)
        if values is None or not any(episode in span for span in self.spans):
            return None
        if self.dims is not None and (not len(self.dims) or self.dims.max() >= values.shape[1]):
            return None
        claimed = self.values
        if self.dims is not None:
            claimed = {n: v[self.dims] for n, v in claimed.items() if len(v) == values.shape[1]}
        if self.chunk is not None:
            values = chunks(values, found.get(STATE), self.dims, self.chunk)
        elif self.dims is not None:
            values = values[:, self.dims]
        return None if values is None else Accumulator.of(values, claimed)

    def take(self, episode: int, tally: Accumulator) -> None:
        """Add what `watch` made; in the order of the episodes, so that sums round alike."""
        for span, whole in zip(self.spans, self.tallies, strict=True):
            if episode in span:
                whole.add(tally)

    def finding(self) -> Finding | None:
        """Where the claim is true of no span that was read whole: the finding of the span it fits best."""
        found = [
            self._judge(tally)
            for span, tally in zip(self.spans, self.tallies, strict=True)
            if tally.episodes == len(span) > 0
        ]
        return None if not found else max(found, key=lambda one: one[0])[1]

    def _judge(self, tally: Accumulator) -> tuple[int, Finding | None]:
        """(how many statistics are true before the first that is not, that one)."""
        passed = 0
        mean = tally.total / tally.rows
        spread = np.sqrt(np.maximum(tally.squares / tally.rows - mean**2, 0))
        for name, ours in {"min": tally.low, "max": tally.high, "mean": mean, "std": spread}.items():
            if name not in self.values:
                continue
            theirs = self.values[name] if self.dims is None else _chosen(self.values[name], self.dims)
            slack = 0.01 * spread if name in ("mean", "std") else 0.0  # float32 sums, sample instead of population std
            if theirs.shape != ours.shape or not (np.abs(ours - theirs) <= ATOL + RTOL * np.abs(ours) + slack).all():
                found = f"{name} is not the data's{self._worst(ours, theirs)}"
                return passed, self._says(found, "statistics of this data")
            passed += 1
        if self.count and self.chunk is None and self.count != tally.rows:
            found = f"count {self.count}, but the data have {tally.rows} rows"
            return passed, self._says(found, "statistics of this data")
        for name in tally.below:
            share, slack = QUANTILES[name], RANK_SLACK * tally.rows + 1
            wrong = (tally.below[name] > share * tally.rows + slack) | (tally.upto[name] < share * tally.rows - slack)
            claimed = self.values[name] if self.dims is None else self.values[name][self.dims]
            edge = ATOL + RTOL * np.abs(claimed)
            wrong |= (claimed < tally.low - edge) | (claimed > tally.high + edge)
            if wrong.any():
                at = int(wrong.argmax())
                averaged = np.allclose(tally.averaged[name] / tally.episodes, claimed, rtol=1e-3, atol=1e-6)
                why = ": the mean of the episodes' quantiles, which is no quantile" if averaged else ""
                place, rank = self._dimension(at), tally.upto[name][at] / tally.rows
                said = f"{name}[{place}] = {claimed[at]:.4g} has {rank:.2%} of the rows below{why}"
                return passed, self._says(said, f"{share:.0%}")
            passed += 1
        return len(self.values) + 1, None

    def _dimension(self, at: int) -> int:
        return at if self.dims is None else int(self.dims[at])

    def _says(self, found: str, expected: str) -> Finding:
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


def _chosen(values: np.ndarray, dims: np.ndarray) -> np.ndarray:
    """Of a claim of another width: as it is, so that the widths show."""
    return values[dims] if dims.max() < len(values) else values
