"""Compute norm statistics of a split, pooled over frames, in one pass over parquet: no video is decoded.

Memory does not grow with the data, files are read side by side, and the result does not depend on how many do. Pooled
means over frames: averaging per-episode quantiles, as others do, is wrong.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prts_core.contract import Contract, require_equal
from prts_core.data.ahead import in_order
from prts_core.data.lerobot_v21.reader import LeRobotDataset, column_array
from prts_core.data.normalize import ACTION, STATE, FeatureStats, NormStats, affine
from prts_core.data.streaming_summary import BLOCK, StreamingSummary
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import digest_file, digest_value
from prts_core.io.progress import Bar

METHOD = "population std; linear quantiles 0.01 and 0.99, exact below 2**18 rows, else of rank error <= 1e-4; pooled"
QUANTILES = (0.01, 0.99)
LEROBOT_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BATCH = 8192  # rows decoded at a time: little memory, and little to do for Python


@dataclass(frozen=True)
class Computed:
    """stats: of the recording as it is. rows: the summary behind it, dimensions of the state first, then the action's.

    relative, relative_rows: the same where actions are trained relative to the state: `relative` has the statistics of
    a[t + h] - s[t] on the action dimensions marked so, `relative_rows` those dimensions only.
    """

    stats: NormStats
    rows: StreamingSummary
    contract: Contract
    relative: NormStats | None = None
    relative_rows: StreamingSummary | None = None

    @property
    def trained(self) -> NormStats:
        """What a policy is normalised by."""
        return self.relative or self.stats


@dataclass(frozen=True)
class _File:
    dataset: LeRobotDataset
    episode: int

    @property
    def path(self) -> Path:
        return self.dataset.path(self.dataset.info.data_file(self.episode))

    @property
    def length(self) -> int:
        return self.dataset.length(self.episode)


def compute(
    root: Path | Sequence[Path], split: str = "train", chunk_length: int | None = None, workers: int | None = None
) -> Computed:
    """Statistics of `split` of the dataset at `root`, or of several datasets of one contract pooled.

    chunk_length: also of state-relative actions, pooled over all rows t of the split and all steps h < chunk_length
    that the episode still has, as a policy with such chunks is trained on them. workers: threads that read, by default
    one a core; the result is the same. Memory: two blocks of 2**18 rows and the summary's, whatever the data's size.

    Raises DataError for damaged tables, numbers that are not finite, an empty split, other widths than the contract's.
    """
    datasets = [LeRobotDataset.open(one) for one in ([root] if isinstance(root, Path) else root)]
    contract = datasets[0].contract
    for other in datasets[1:]:
        require_equal(contract, other.contract, left_name=str(datasets[0].root), right_name=str(other.root))
    relative = _relative(contract, chunk_length, datasets[0].root)
    files = [_File(dataset, episode) for dataset in datasets for episode in dataset.episodes(split)]
    if not files:
        problem, info = "A split has no episodes", datasets[0].root / "meta" / "info.json"
        raise DataError(problem, file=info, field=f"splits.{split}")
    at = len(contract.state)
    rows, chunks = StreamingSummary(at + len(contract.action)), StreamingSummary(len(relative))
    digests: list[str] = []
    with Bar("reading tables", len(files)) as bar:
        for own, steps, found in in_order(
            lambda leaf: _summarise(leaf, contract, relative, chunk_length), _leaves(files), workers or _cores()
        ):
            rows.merge(own)
            chunks.merge(steps)
            digests += found
            bar.update(len(digests))

    def record(parts: Mapping[str, np.ndarray], error: float, length: int | None) -> NormStats:
        state, action = (FeatureStats(**{k: v[part] for k, v in parts.items()}) for part in (np.s_[:at], np.s_[at:]))
        made_from = _made_from(digests, contract, split, length)
        return NormStats(state, action, rows.count, split, digest_value(made_from), error, made_from)

    described = _described(rows)
    stats = record(described, rows.rank_error, None)
    if chunk_length is None:
        return Computed(stats, rows, contract)
    mixed = {name: values.copy() for name, values in described.items()}
    for name, values in _described(chunks).items():
        mixed[name][at + np.array(relative)] = values
    trained = record(mixed, max(rows.rank_error, chunks.rank_error), chunk_length)
    return Computed(stats, rows, contract, trained, chunks)


def _relative(contract: Contract, chunk_length: int | None, root: Path) -> list[int]:
    """Action dimensions that are trained relative to the state; a ConfigError where chunks of them make no sense."""
    relative = [index for index, dim in enumerate(contract.action) if dim.relative]
    if chunk_length is not None and (chunk_length < 1 or not relative):
        raise ConfigError(
            "There is nothing to be relative",
            file=root / "meta" / "contract.json",
            field="action.relative",
            found=f"{len(relative)} relative dimensions, chunks of {chunk_length}",
            expected="at least one of each",
        )
    if chunk_length is not None and relative[-1] >= len(contract.state):
        raise ConfigError(
            "An action is relative to a state that is not there",
            file=root / "meta" / "contract.json",
            field=f"action.relative, dimension {relative[-1]}",
            found=f"{len(contract.state)} state dimensions",
            expected="a state dimension of the same number",
            cure="correct relative: in the robot's YAML",
        )
    return relative


def differences(
    made_from: Mapping[str, Any], digests: Sequence[str], contract: Contract, split: str, chunk_length: int | None
) -> list[tuple[str, str, str]]:
    """(what, found, wanted), shortened to be shown, where `made_from` of statistics is not what computing them today
    would say. digests: SHA-256 of the split's tables, in order."""
    wanted = _made_from(list(digests), contract, split, chunk_length)
    return [
        (name, str(made_from.get(name))[:19], str(value)[:19])
        for name, value in wanted.items()
        if made_from.get(name) != value
    ]


def statistics_name(contract: Contract, chunk_length: int) -> str:
    """The file of stage stats that a policy with this contract and chunk length is normalised by."""
    return f"state_relative_ck{chunk_length}_norm_stats.json" if any(contract.relative) else "norm_stats.json"


def constant_dimensions(stats: FeatureStats) -> int:
    """How many dimensions QUANTILE normalisation maps to 0 because their spread is nothing."""
    return int((affine(stats, "QUANTILE")[1] == 0).sum())


# ---- the order of things: fixed by the files, whoever reads them ---------------------------------------------------
def table_digest(path: Path) -> str:
    """SHA-256 of a table; one that holds several episodes is read once for them."""
    info = path.stat()
    return _digest_of(path, info.st_ino, info.st_size, info.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest_of(path: Path, *state: int) -> str:
    return digest_file(path)


def _leaves(files: Sequence[_File]) -> Iterator[list[_File]]:
    """Neighbouring files, together at least BLOCK rows: the leaves of the merge tree, one task each."""
    leaf: list[_File] = []
    rows = 0
    for file in files:
        leaf.append(file)
        rows += file.length
        if rows >= BLOCK:
            yield leaf
            leaf, rows = [], 0
    if leaf:
        yield leaf


def _cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


# ---- one leaf -------------------------------------------------------------------------------------------------------
def _summarise(
    leaf: list[_File], contract: Contract, relative: list[int], chunk_length: int | None
) -> tuple[StreamingSummary, StreamingSummary, list[str]]:
    """(states and actions, state-relative chunks, SHA-256 of each file)."""
    lengths = [file.length for file in leaf]
    rows = _Blocks(len(contract.state) + len(contract.action), sum(lengths))
    spans = [(length, min(chunk_length or 0, length)) for length in lengths]
    chunks = _Blocks(len(relative), sum(span * length - span * (span - 1) // 2 for length, span in spans))
    digests = []
    try:
        for file in leaf:
            if not file.path.is_file():
                file.dataset.table(file.episode, [STATE, ACTION])  # says so
            digests.append(table_digest(file.path))
            past = np.zeros((len(relative), 0), np.float32)  # states that actions still to come are relative to
            for state, action in _pieces(file, contract):
                rows.add(state.T, action.T)
                if chunk_length is not None:
                    past = _add_chunks(chunks, action.T[relative], past, state.T[relative], chunk_length)
        return rows.done(), chunks.done(), digests
    except FloatingPointError as err:
        for file in leaf:
            deque(_pieces(file, contract, check=True), maxlen=0)
        raise DataError(
            "Differences of actions and states leave the range of float32",
            file=leaf[0].path,
            expected="numbers that a policy can be trained on",
        ) from err


def _add_chunks(
    chunks: _Blocks, actions: np.ndarray, past: np.ndarray, states: np.ndarray, chunk_length: int
) -> np.ndarray:
    """Add actions (R, n) minus the state h steps before, for every h of a chunk; returns the states (R, < chunk_length)
    that the next rows of the episode may still look back to."""
    known, rows = past.shape[1], actions.shape[1]
    seen = np.concatenate([past, states], axis=1)
    for step in range(min(chunk_length, known + rows)):
        first = max(0, step - known)  # of `actions`: the first that has a state `step` rows before
        chunks.add(actions[:, first:] - seen[:, first + known - step : rows + known - step])
    return seen[:, max(0, seen.shape[1] - chunk_length + 1) :]


class _Blocks:
    """Rows, dimensions first, gathered into blocks of equal size between BLOCK and twice that (one, if they are
    fewer)."""

    def __init__(self, width: int, expected: int) -> None:
        self.summary = StreamingSummary(width)
        self.size = -(-expected // max(1, expected // BLOCK))
        self.left, self.used = expected, 0
        self.block = np.empty((width, 0), np.float32)

    def add(self, *parts: np.ndarray) -> None:
        """Copy in (D1, n), (D2, n), ...: the dimensions one after another."""
        done, rows = 0, parts[0].shape[1]
        while done < rows:
            if not self.used:
                self.block = np.empty((len(self.summary.mean), min(self.size, self.left)), np.float32)
            taken, at = min(rows - done, self.block.shape[1] - self.used), 0
            for part in parts:
                self.block[at : at + len(part), self.used : self.used + taken] = part[:, done : done + taken]
                at += len(part)
            self.used, self.left, done = self.used + taken, self.left - taken, done + taken
            if self.used == self.block.shape[1]:
                self._flush()

    def done(self) -> StreamingSummary:
        assert not self.left and not self.used, "every file was held against its announced length"
        return self.summary

    def _flush(self) -> None:
        block, self.block, self.used = self.block, np.empty((len(self.block), 0), np.float32), 0
        self.summary.merge(StreamingSummary.of(block))


def _pieces(file: _File, contract: Contract, check: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """State (n, D) and action (n, A), float32, of at most BATCH rows at a time. check: numbers must be finite."""
    path, seen = file.path, 0
    try:
        with _batches(file) as batches:
            for batch in batches:
                pair = []
                for key, width in ((STATE, len(contract.state)), (ACTION, len(contract.action))):
                    values = _vectors(batch.column(key), path, key)
                    _check(values, width, path, key, seen, finite=check)
                    pair.append(values)
                seen += batch.num_rows
                yield pair[0], pair[1]
    except (pa.ArrowException, OSError, DataError):
        file.dataset.columns(file.episode, [STATE, ACTION])  # as above, with the row's number in the file
        raise


@contextmanager
def _batches(file: _File) -> Iterator[Iterator[pa.RecordBatch]]:
    """An episode's states and actions, at most BATCH rows at a time."""
    if file.dataset.info.data_rows(file.episode) is not None:  # a part of a long file: its row groups are kept decoded
        yield iter(file.dataset.table(file.episode, [STATE, ACTION]).to_batches(BATCH))
        return
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as parquet:
        if parquet.metadata.num_rows != file.length or not {STATE, ACTION} <= set(parquet.schema_arrow.names):
            file.dataset.table(file.episode, [STATE, ACTION])  # says what is wrong with it
        yield parquet.iter_batches(BATCH, columns=[STATE, ACTION], use_threads=False)


def _vectors(column: pa.Array, path: Path, key: str) -> np.ndarray:
    """(n, D) float32, without a copy where the column is sound: the way through `column_array` makes two.

    By DLPack and offsets: pyarrow's `to_numpy` imports pandas, and `flatten` its functions, which both take
    longer than the statistics of most datasets.
    """
    if pa.types.is_list(column.type) and len(column) and not column.null_count:
        edges = np.from_dlpack(column.offsets)
        inner, lengths = column.values[int(edges[0]) : int(edges[-1])], np.diff(edges)
        if inner.type == pa.float32() and not inner.null_count and (lengths == lengths[0]).all() and lengths[0]:
            return np.from_dlpack(inner).reshape(len(column), -1)
    values = column_array(pa.chunked_array([column]), path, key)
    return values.reshape(len(values), -1).astype(np.float32, copy=False)


def _check(values: np.ndarray, width: int, path: Path, key: str, first: int, finite: bool) -> None:
    """first: number of the first of these rows in the file."""
    if values.shape[1] != width:
        raise DataError(
            "A table's vectors do not have the contract's width",
            file=path,
            field=key,
            found=values.shape[1],
            expected=width,
            cure="run `prts validate`: it names every such row",
        )
    if finite and not np.isfinite(values).all():
        row, dimension = np.argwhere(~np.isfinite(values))[0].tolist()
        raise DataError(
            "A table holds a number that is not finite",
            file=path,
            field=f"{key}, row {first + row}, dimension {dimension}",
            found=str(values[row, dimension]),
            expected="finite numbers",
            cure="run `prts validate`: it names every such row",
        )


# ---- from a summary to a record ------------------------------------------------------------------------------------
def _described(rows: StreamingSummary) -> dict[str, np.ndarray]:
    """What `FeatureStats` is made of, of all dimensions."""
    q01, q99 = rows.quantiles(QUANTILES)
    return {"mean": rows.mean, "std": rows.std, "min": rows.low, "max": rows.high, "q01": q01, "q99": q99}


def _made_from(digests: list[str], contract: Contract, split: str, chunk_length: int | None) -> dict[str, Any]:
    """What the fingerprint is a digest of. chunk_length: of state-relative statistics, else none."""
    return {
        "data": digest_value(digests),
        "contract": contract.fingerprint,
        "split": split,
        "chunk_length": chunk_length,
        "method": METHOD,
    }
