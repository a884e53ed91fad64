"""Read and write parquet tables: some columns, some rows, and of pictures only those that are asked for.

A row group is the least that can be read. Tables with pictures are written in small ones, so that one picture costs
about its own bytes; of a table of others it costs its whole group, which is kept for the pictures that follow. Files
read lately stay open in each thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prts_core.io.errors import DataError

GROUP_BYTES, GROUP_ROWS = 128 * 1024, 16  # of pictures in a row group, at most: reading it costs less than one decode
_MAX_OPEN = 32  # tables with pictures that a thread keeps open
_MAX_PICTURES = 64 * 2**20  # bytes of pictures that a thread keeps, of one row group
_CURE = "restore it from its source or its DVC cache, or convert again"


def read_parquet(path: Path, keys: list[str] | None = None, rows: range | None = None) -> pa.Table:
    """A parquet file's rows, or one DataError for a file that is missing, truncated or without a column of `keys`.

    rows: some that follow each other; only the row groups that hold them are read. Fewer come where the file ends.
    """
    if rows is not None:
        with _faults(path):
            return _OPEN.rows(path, keys, rows)
    with _faults(path), opened_table(path) as file:
        require_columns(file.schema_arrow.names, keys or [], path)
        return file.read(columns=keys, use_threads=False)


def opened_table(path: Path) -> pq.ParquetFile:
    """A parquet file, open; by default pyarrow would hold every column that was read until the file goes away."""
    return pq.ParquetFile(path, pre_buffer=False)


def read_pictures(path: Path, key: str, rows: Sequence[int]) -> list[bytes]:
    """The stored bytes of the pictures at `rows` of column `key`, in this order; b"" for an empty cell.

    Raises DataError as `read_parquet`, and for a row that the file does not have.
    """
    found: dict[int, bytes] = {}
    with _faults(path), _OPEN.file(path) as (file, groups):
        require_columns(file.schema_arrow.names, [key], path)
        beyond = [row for row in rows if not 0 <= row < groups.rows]
        if beyond:
            raise DataError("A table ends before a row", file=path, found=f"{groups.rows} rows", expected=beyond[0])
        for group in sorted({groups.number(row) for row in rows}):
            cells = _OPEN.pictures(path, file, group, key)
            if not pa.types.is_struct(cells.type) or "bytes" not in [field.name for field in cells.type]:
                raise DataError(
                    "A column holds no pictures", file=path, field=key, found=str(cells.type), expected="{bytes, path}"
                )
            for row in {row for row in rows if groups.number(row) == group}:
                picture = cells[row - int(groups.starts[group])]
                found[row] = (picture["bytes"].as_py() if picture.is_valid else None) or b""
    return [found[row] for row in rows]


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write `table` to a file; one with pictures in row groups small enough to read singly."""
    with parquet_writer(path, table.schema) as writer:
        append_table(writer, table)


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer for several tables of one schema."""
    return pq.ParquetWriter(path, schema, use_dictionary=not picture_columns(schema))  # no two pictures are the same


def append_table(writer: pq.ParquetWriter, table: pa.Table) -> None:
    """Write the rows of `table`: one row group, or small ones where it has pictures."""
    size = sum(table.column(key).nbytes for key in picture_columns(table.schema))
    step = min(GROUP_ROWS, table.num_rows * GROUP_BYTES // size) if size else table.num_rows
    writer.write_table(table, row_group_size=max(1, step))


def picture_columns(schema: pa.Schema) -> list[str]:
    """Columns whose cells are {bytes, path}."""
    return [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and {"bytes", "path"} <= {inner.name for inner in field.type}
    ]


@dataclass(frozen=True)
class _Groups:
    """Where the row groups of a file begin: starts (G + 1,)."""

    starts: np.ndarray

    @classmethod
    def of(cls, file: pq.ParquetFile) -> _Groups:
        held = file.metadata
        counts = (held.row_group(number).num_rows for number in range(held.num_row_groups))
        return cls(np.cumsum([0, *counts]))

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def number(self, row: int) -> int:
        """The group that holds `row`."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1


class _OpenTables(threading.local):
    """Files that this thread has read lately; one that was replaced meanwhile is opened anew.

    The row groups decoded last are kept: in files of others one group holds many episodes, asked for one by one.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int, int], tuple[pq.ParquetFile, _Groups]] = OrderedDict()
        self._decoded: tuple[tuple, pa.Table] | None = None
        self._pictures: tuple[tuple | None, dict[str, pa.ChunkedArray]] = (None, {})

    def rows(self, path: Path, keys: list[str] | None, rows: range) -> pa.Table:
        """Rows of some columns, as far as the file goes."""
        with self.file(path) as (file, groups):
            require_columns(file.schema_arrow.names, keys or [], path)
            first, last = rows.start, min(rows.stop, groups.rows) - 1
            if last < first:
                return file.schema_arrow.empty_table().select(keys if keys is not None else file.schema_arrow.names)
            begin, end = groups.number(first), groups.number(last)
            wanted = (_state(path), begin, end, None if keys is None else tuple(keys))
            if self._decoded is not None and self._decoded[0] == wanted:
                table = self._decoded[1]
            else:
                self._decoded = None  # first: two of them are too much memory
                table = file.read_row_groups(list(range(begin, end + 1)), columns=keys, use_threads=False)
                whole = table.num_rows == last - first + 1
                self._decoded = None if whole else (wanted, table)
            return table.slice(first - int(groups.starts[begin]), last - first + 1)

    def pictures(self, path: Path, file: pq.ParquetFile, group: int, key: str) -> pa.ChunkedArray:
        """A column of a row group. Those of the group read last are kept, up to some bytes."""
        wanted = (_state(path), group)
        if self._pictures[0] != wanted:
            self._pictures = (wanted, {})
        kept = self._pictures[1]
        if key in kept:
            return kept[key]
        cells = file.read_row_group(group, columns=[key], use_threads=False).column(key)
        size = sum(column.nbytes for column in (cells, *kept.values()))
        if size <= _MAX_PICTURES:
            kept[key] = cells
        return cells

    @contextmanager
    def file(self, path: Path) -> Iterator[tuple[pq.ParquetFile, _Groups]]:
        key = _state(path)
        opened = self._kept.pop(key, None)
        if opened is None:
            file = opened_table(path)
            opened = file, _Groups.of(file)
        try:
            yield opened
        except BaseException:
            opened[0].close()
            raise
        self._kept[key] = opened
        while len(self._kept) > _MAX_OPEN:
            self._kept.popitem(last=False)[1][0].close()


def _state(path: Path) -> tuple[str, int, int, int]:
    """What changes when a file is replaced."""
    info = path.stat()
    return str(path), info.st_ino, info.st_size, info.st_mtime_ns


_OPEN = _OpenTables()


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as err:
        raise DataError("A table is missing", file=path, expected="a parquet file", cure=_CURE) from err
    except (pa.ArrowException, OSError) as err:
        problem, expected = "A table cannot be read: it is truncated or damaged", "a whole parquet file"
        found = f"{path.stat().st_size} bytes; {' '.join(str(err).split())[:200]}"
        raise DataError(problem, file=path, found=found, expected=expected, cure=_CURE) from err


def require_columns(names: Iterable[str], keys: Iterable[str], path: Path) -> None:
    """A DataError where a table at `path`, with columns `names`, lacks one of `keys`."""
    lacking = [key for key in keys if key not in names]
    if lacking:
        raise DataError(
            "A table lacks a column",
            file=path,
            field=lacking[0],
            found=", ".join(names),
            expected=lacking[0],
            cure="restore the file from its source, or convert again",
        )


def column_array(column: pa.ChunkedArray, path: Path, key: str) -> np.ndarray:
    """A parquet column as numpy: (T,) for scalars, (T, D) for lists of one length; no nulls, no ragged rows."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunks at all
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError("A table has an empty cell", file=path, field=f"{key}, row {row}", found="null")
    if not pa.types.is_nested(array.type):
        return array.to_numpy(zero_copy_only=False)
    if pa.types.is_struct(array.type):
        raise DataError("A column holds structures, not numbers", file=path, field=key, found=str(array.type))
    if not pa.types.is_fixed_size_list(array.type):
        widths = np.asarray(array.value_lengths())
        other = np.flatnonzero(widths != widths[:1])
        if len(other):
            row, problem = int(other[0]), "Rows of a table differ in width"
            found, expected = int(widths[row]), int(widths[0])
            cure = "record every row with the same dimensions"
            raise DataError(problem, file=path, field=f"{key}, row {row}", found=found, expected=expected, cure=cure)
    if not len(array):
        return np.zeros((0, 0), np.float32)
    inner = column_array(pa.chunked_array([array.flatten()]), path, key)
    return inner.reshape(len(array), -1, *inner.shape[1:])
