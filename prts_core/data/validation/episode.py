"""What one episode's table tells about itself: its counters as arrays, and the few numbers that later laws compare.

It knows one parquet table at a time and judges nothing. `Facts` is small, so that a dataset of any size fits in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from prts_core.contract import Contract
from prts_core.data.lerobot_v21.reader import column_array
from prts_core.data.lerobot_v21.schema import ACTION, STATE, Info
from prts_core.io.errors import DataError

_SHIFTS = (0, 1, 2)  # rows by which an action is looked for in later states
_EQUAL = 1e-5  # relative to the spread of a dimension: float32 noise, not motion


@dataclass(frozen=True)
class Series:
    """One vector feature over an episode, per dimension (D,), float64.

    step: the largest change from one row to the next. at: its row. usual: the 95th percentile of the changes.
    """

    count: int
    low: np.ndarray
    high: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    step: np.ndarray
    at: np.ndarray
    usual: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))


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
    except DataError:
        return None  # a finding of the tables already
    if values.dtype.kind not in "fiu":
        return None
    wide: np.ndarray = values.reshape(len(values), -1).astype(np.float64)
    return wide if np.isfinite(wide).all() else None


def facts(table: pa.Table, episode: int, info: Info, path: Path, contract: Contract | None = None) -> EpisodeSummary:
    """`Facts` of one episode's table. contract: whose limits the rows are held against."""
    found = {key: vectors(table, key, path) for key in (STATE, ACTION) if key in info.features}
    sound = {key: values for key, values in found.items() if values is not None}
    outside = () if contract is None else tuple(_outside(sound, contract))
    indices = numbers(table, "task_index")
    tasks = () if indices is None else tuple(np.unique(indices[np.isfinite(indices)]).astype(int).tolist())
    if set(sound) != {STATE, ACTION}:
        return EpisodeSummary(
            episode, {key: series(values) for key, values in sound.items()}, tasks=tasks, outside=outside
        )
    state, action = sound[STATE], sound[ACTION]
    step = np.abs(np.diff(state, axis=0))
    spread = np.ptp(state, axis=0)
    motion = (step / np.where(spread > 0, spread, 1)).max(1, initial=0).astype(np.float16)
    held: np.ndarray = ~np.any(step, axis=1) & np.any(np.diff(action, axis=0), axis=1)
    content = hashlib.sha256(state.tobytes())
    content.update(action.tobytes())
    return EpisodeSummary(
        episode,
        {key: series(values) for key, values in sound.items()},
        motion,
        longest_run(held),
        int(held.sum()),
        _shift(state, action),
        content.hexdigest(),
        tasks,
        outside,
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
    return Series(
        len(values),
        values.min(0),
        values.max(0),
        values.sum(0),
        (values**2).sum(0),
        step.max(0),
        step.argmax(0) + 1,
        np.partition(step, place, axis=0)[place],
    )


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
