"""Sum up one episode's table: its counters as arrays, and the few numbers that later laws compare.

`EpisodeSummary` is small, so that a dataset of any size fits in memory; nothing is judged here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from prts_core.contract import Contract
from prts_core.data.lerobot_v21.schema import ACTION, STATE, Info
from prts_core.data.lerobot_v21.tables import column_array
from prts_core.io.errors import DataError

RTOL, ATOL = 1e-4, 1e-5  # float32 sums of others
_SHIFTS = (0, 1, 2)  # rows by which an action is looked for in later states
_EQUAL = 1e-5  # relative to the spread of a dimension: float32 noise, not motion


@dataclass(kw_only=True)
class Moments:
    """Range and sums of `rows` rows, each per dimension (D,) float64."""

    rows: int
    low: np.ndarray
    high: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, **more: Any) -> Self:
        """Of (T, D) values. more: what a subclass adds."""
        squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        low, high = (edge.astype(np.float64) for edge in (values.min(0), values.max(0)))
        return cls(rows=len(values), low=low, high=high, total=values.sum(0, dtype=np.float64), squares=squares, **more)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.rows

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares / self.rows - self.mean**2, 0))

    def contradiction(self, claimed: Mapping[str, np.ndarray | None]) -> tuple[str, np.ndarray] | None:
        """The first of min, max, mean and std in `claimed` that is not that of these rows, and what is."""
        for name, ours in {"min": self.low, "max": self.high, "mean": self.mean, "std": self.std}.items():
            if name not in claimed:
                continue
            theirs = claimed[name]
            # float32 sums of others, the sample's std instead of the population's
            slack = ATOL + RTOL * np.abs(ours) + (0.01 * self.std if name in ("mean", "std") else 0.0)
            if theirs is None or theirs.shape != ours.shape or not (np.abs(ours - theirs) <= slack).all():
                return name, ours
        return None


@dataclass(kw_only=True)
class Series(Moments):
    """One vector feature over an episode. step: the largest change from one row to the next. at: its row. usual: the
    95th percentile of the changes."""

    step: np.ndarray
    at: np.ndarray
    usual: np.ndarray


@dataclass(frozen=True)
class Outside:
    """Rows of one dimension beyond limits that the Contract declares. row: the first of `rows`; value: the worst."""

    key: str
    index: int
    row: int
    rows: int
    value: float


@dataclass(frozen=True)
class EpisodeSummary:
    """One episode. series: of observation.state and action, where they are sound. motion: (T - 1,) float16, how far the
    state moves from row to row as a share of its range in the episode, the widest dimension. frozen: (first row, rows)
    of the longest run in which the action moves and no dimension of the state does. repeated: rows whose state is bit
    for bit the row's before, although the action moves. shift: rows after which every state is the action; None: never.
    tasks: the task numbers of its rows. outside: rows beyond declared limits.
    """

    episode: int
    series: dict[str, Series] = field(default_factory=dict)
    motion: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float16))
    frozen: tuple[int, int] = (0, 0)
    repeated: int = 0
    shift: int | None = None
    digest: str = ""
    tasks: tuple[int, ...] = ()
    outside: tuple[Outside, ...] = ()


def numbers(table: pa.Table, key: str) -> np.ndarray | None:
    """A scalar column as numbers, NaN where it is empty; None where it is missing or holds something else."""
    if key not in table.column_names:
        return None
    kind = table.schema.field(key).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    column = table.column(key)
    return (column.cast(pa.float64()) if column.null_count else column).to_numpy()


def vectors(table: pa.Table, key: str, path: Path) -> np.ndarray | None:
    """A feature as (T, D) float64; None where it is missing, ragged, empty in places, no number or not finite."""
    if key not in table.column_names or not table.num_rows:
        return None
    try:
        values = column_array(table.column(key), path, key)
    except DataError:  # a finding of the tables already
        return None
    if values.dtype.kind not in "fiu":
        return None
    wide: np.ndarray = values.reshape(len(values), -1).astype(np.float64)
    return wide if np.isfinite(wide).all() else None


def summarize(
    table: pa.Table, episode: int, info: Info, path: Path, contract: Contract | None = None
) -> EpisodeSummary:
    """`EpisodeSummary` of one episode's table. contract: whose limits the rows are held against."""
    found = {key: vectors(table, key, path) for key in (STATE, ACTION) if key in info.features}
    sound = {key: values for key, values in found.items() if values is not None}
    indices = numbers(table, "task_index")
    summary = EpisodeSummary(
        episode,
        {key: series(values) for key, values in sound.items()},
        tasks=() if indices is None else tuple(np.unique(indices[np.isfinite(indices)]).astype(int).tolist()),
        outside=() if contract is None else tuple(_outside(sound, contract)),
    )
    if set(sound) != {STATE, ACTION}:
        return summary
    state, action = sound[STATE], sound[ACTION]
    step = np.abs(np.diff(state, axis=0))
    spread = np.ptp(state, axis=0)
    held: np.ndarray = ~np.any(step, axis=1) & np.any(np.diff(action, axis=0), axis=1)
    return replace(
        summary,
        motion=(step / np.where(spread > 0, spread, 1)).max(1, initial=0).astype(np.float16),
        frozen=longest_run(held),
        repeated=int(held.sum()),
        shift=_shift(state, action),
        digest=hashlib.sha256(state.tobytes() + action.tobytes()).hexdigest(),
    )


def _outside(sound: dict[str, np.ndarray], contract: Contract) -> Iterator[Outside]:
    for key, dimensions in ((STATE, contract.state), (ACTION, contract.action)):
        values = sound.get(key)
        if values is None or values.shape[1] != len(dimensions):
            continue  # a finding of the contract already
        for index, dimension in enumerate(dimensions):
            if dimension.limits is None:
                continue
            # float32 data meet limits of two or three digits
            low, high = (np.float64(np.float32(limit)) for limit in dimension.limits)
            excess = np.maximum(low - values[:, index], values[:, index] - high)
            rows = np.flatnonzero(excess > 0)
            if len(rows):
                worst = float(values[int(excess.argmax()), index])
                yield Outside(key, index, int(rows[0]), len(rows), worst)


def series(values: np.ndarray) -> Series:
    """`Series` of (T, D) values."""
    step = np.abs(np.diff(values, axis=0)) if len(values) > 1 else np.zeros((1, values.shape[1]))
    place = int(0.95 * (len(step) - 1))
    usual = np.partition(step, place, axis=0)[place]
    return Series.of(values, step=step.max(0), at=step.argmax(0) + 1, usual=usual)


def longest_run(flags: np.ndarray) -> tuple[int, int]:
    """(start, length) of the longest run of True in (N,) flags; (0, 0) where there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(starts[longest]), int(lengths[longest])


def _shift(state: np.ndarray, action: np.ndarray) -> int | None:
    """After how many rows the state equals the action in every dimension and row; None where it never does, or where
    nothing moves, or the widths differ."""
    if state.shape != action.shape or len(state) < 8:
        return None
    spread = np.maximum(np.ptp(state, axis=0), np.ptp(action, axis=0))
    if not (spread > 0).any():
        return None
    for shift in _SHIFTS:
        apart = np.abs(action[: len(action) - shift] - state[shift:])
        if (apart <= _EQUAL * spread + 1e-9).all():
            return shift
    return None
