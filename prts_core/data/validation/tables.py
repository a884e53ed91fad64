"""Check parquet tables of a dataset by pandera on eager polars frames, row by row.

Frames must be eager: pandera checks only the schema of a lazy one, and an action of the wrong width would pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandera.polars as pa
import polars as pl
import pyarrow as arrow
from pandera.errors import SchemaErrors

from prts_core.data.images import opened_picture
from prts_core.data.lerobot_v21.schema import EpisodeRow, Info
from prts_core.data.validation.report import Finding
from prts_core.io.errors import DataError

_BATCH_ROWS = 200_000
_ROWS_SHOWN = 5  # per file, column and law: a broken sensor breaks every row
_COUNTERS = ("frame_index", "episode_index", "index", "task_index")
_NUMBERS = ("float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_DTYPES = {"string": pl.String(), **{dtype: pl.Series(np.empty(0, dtype)).dtype for dtype in _NUMBERS}}


def _rule(name: str, true_of: Callable[[pl.Expr], pl.Expr]) -> pa.Check:
    """What must be true of every cell of a column, under the name that findings give it."""
    return pa.Check(lambda data: data.lazyframe.select(true_of(pl.col(data.key))), name=name)


_FINITE = _rule("finite numbers", lambda column: column.is_finite())
_ALL_FINITE = _rule(
    "finite numbers",
    lambda column: column.list.eval(pl.element().is_finite() & pl.element().is_not_null()).list.all(),
)


def _width(width: int) -> pa.Check:
    return _rule(f"{width} dimensions in every row", lambda column: column.list.len() == width)


def frame_schema(info: Info) -> pa.DataFrameSchema:
    """The schema of one episode's table: LeRobot's own columns, and the features that info.json declares."""
    columns = {"timestamp": pa.Column(pl.Float32, pa.Check.ge(0))}
    columns |= {name: pa.Column(pl.Int64, pa.Check.ge(0)) for name in _COUNTERS}
    for key, feature in info.features.items():
        if feature.is_image or key in columns or feature.dtype not in _DTYPES:
            continue
        inner, (width, *more) = _DTYPES[feature.dtype], feature.shape
        if more:
            columns[key] = pa.Column(None)  # arrays of several axes: presence only
        elif width == 1:
            columns[key] = pa.Column(inner, [_FINITE] if inner.is_float() else [])
        else:
            columns[key] = pa.Column(pl.List(inner), [_width(width)] + ([_ALL_FINITE] if inner.is_float() else []))
    return pa.DataFrameSchema(columns)


def eager(frame: pl.DataFrame) -> pl.DataFrame:
    """Fixed-size lists as plain lists, so that one schema fits what different writers store."""
    arrays = [name for name, kind in frame.schema.items() if isinstance(kind, pl.Array)]
    return frame.with_columns(pl.col(name).arr.to_list() for name in arrays) if arrays else frame


def framed(table: arrow.Table, info: Info, path: Path) -> pl.DataFrame:
    """The columns of numbers that info.json declares and the table has; DataError for what polars cannot hold."""
    keys = [key for key, feature in info.features.items() if not feature.is_image and key in table.column_names]
    try:
        return eager(pl.DataFrame(pl.from_arrow(table.select(keys))))
    except (pl.exceptions.PolarsError, arrow.ArrowException, ValueError, TypeError) as err:
        raise DataError(
            "A table holds columns of an unknown kind",
            file=path,
            found=f"{type(err).__name__}: {err}",
            expected="numbers, vectors and texts",
            cure="restore it from its source, or convert again",
        ) from err


def law_stills(table: arrow.Table, row: EpisodeRow, info: Info, depth: str) -> Iterator[Finding]:
    """Pictures in the table can be decoded: every one, the first and the last, or none (depth "packets")."""
    file = info.data_name(row.episode_index)
    for key in (key for key, feature in info.features.items() if feature.dtype == "image"):
        if key not in table.column_names:
            yield Finding("table columns", file, f"no column {key!r}", "every feature of info.json that is no video")
            continue
        cells = table.column(key)
        if not arrow.types.is_struct(cells.type) or "bytes" not in [
            cells.type.field(i).name for i in range(cells.type.num_fields)
        ]:
            yield Finding("table types", file, f"{key}: {cells.type}", f"{key}: pictures as {{bytes, path}}")
            continue
        last = table.num_rows - 1
        for at in range(last + 1) if depth == "every" else sorted({0, last}) if depth == "ends" and last >= 0 else ():
            data = (cells[at].as_py() or {}).get("bytes")
            try:
                with opened_picture(data or b"", "An image in a table cannot be decoded") as image:
                    image.load()
                    size = (image.height, image.width)
            except DataError as err:
                cure = "record the row again, or leave the episode out"
                found = f"{key}: {err.found}"
                yield Finding("table values", file, found, "a picture that can be decoded", cure, row=at)
                break
            if size != info.features[key].image_size:
                expected = f"(height, width) {info.features[key].image_size}"
                yield Finding("table values", file, f"{key}: {size}", expected, row=at)
                break


def check_tables(tables: Iterable[tuple[str, pl.DataFrame]], schema: pa.DataFrameSchema) -> Iterator[Finding]:
    """Findings of many tables, given as (file, frame). Tables of one form go together: pandera costs per call."""
    batch: list[tuple[str, pl.DataFrame]] = []
    rows = 0
    for file, frame in tables:
        frame = eager(frame)
        if batch and (frame.schema != batch[0][1].schema or rows > _BATCH_ROWS):
            yield from _check_batch(batch, schema)
            batch, rows = [], 0
        batch.append((file, frame))
        rows += frame.height
    if batch:
        yield from _check_batch(batch, schema)


def _check_batch(batch: list[tuple[str, pl.DataFrame]], schema: pa.DataFrameSchema) -> Iterator[Finding]:
    frame = pl.concat([part for _, part in batch], rechunk=True)
    starts = np.cumsum([0] + [part.height for _, part in batch])
    try:
        schema.validate(frame, lazy=True)
        return
    except SchemaErrors as err:
        cases = err.failure_cases.unique(maintain_order=True)
    seen: Counter[tuple[str, str, str]] = Counter()
    for case in cases.iter_rows(named=True):
        column, row, check = case["column"], case["index"], str(case["check"])
        if column not in frame.columns:
            expected = "every feature of info.json that is no video"
            found = f"no column {column if column in schema.columns else case['failure_case']!r}"
            yield Finding("table columns", batch[0][0], found=found, expected=expected)
        elif row is None:
            expected = f"{column}: {schema.columns[column].dtype}"
            yield Finding("table types", batch[0][0], found=f"{column}: {case['failure_case']}", expected=expected)
        else:
            part = int(np.searchsorted(starts, row, side="right")) - 1
            key = (batch[part][0], column, check)
            seen[key] += 1
            if seen[key] <= _ROWS_SHOWN:
                found = _cell(frame, column, int(row))
                cure = "record the row again, or leave the episode out"
                at = int(row - starts[part])
                yield Finding("table values", key[0], row=at, found=found, expected=f"{column}: {check}", cure=cure)
    for (file, column, check), count in seen.items():
        if count > _ROWS_SHOWN:
            found = f"{column}: {count - _ROWS_SHOWN} more rows like these"
            yield Finding("table values", file, found=found, expected=f"{column}: {check}")


def _cell(frame: pl.DataFrame, column: str, row: int) -> str:
    """A cell short enough to read: its width, and what is wrong in it."""
    value = frame[column][row]
    if not isinstance(value, pl.Series):
        return f"{column} = {value}"
    bad = [f"[{i}] = {x}" for i, x in enumerate(value) if x is None or (isinstance(x, float) and not math.isfinite(x))]
    return f"{column}: {len(value)} dimensions" + (", " + ", ".join(bad[:4]) if bad else "")
