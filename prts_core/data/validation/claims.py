"""Hold one feature's statistics, as a file claims them, against the rows: moments and range, and quantiles by rank.

Rows are summed up episode by episode in constant memory; whether a quantile is right is judged by how many rows lie
below it, because it may come from a sketch or another interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from prts_core.data.lerobot_v21.schema import STATE
from prts_core.data.validation.episode import ATOL, RTOL, Moments
from prts_core.data.validation.report import Finding, Severity

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
RANK_SLACK = 2e-3  # of the rows, and one row: what sketches and other interpolations may be off
CURE = "compute them again from this data (`prts stats`; lerobot: compute_stats), or remove the file"


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
        for name, share in QUANTILES.items():
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
    wholes: dict[int, Accumulator] = field(default_factory=dict)  # of a span, by its place

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
        return None if values is None else Accumulator.summed(values, claimed)

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
        claimed = self.values if self.dims is None else {n: _chosen(v, self.dims) for n, v in self.values.items()}
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
            share, slack = QUANTILES[name], RANK_SLACK * tally.rows + 1
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


def _chosen(values: np.ndarray, dims: np.ndarray) -> np.ndarray:
    """Of a claim of another width: as it is, so that the widths show."""
    return values[dims] if dims.max() < len(values) else values
