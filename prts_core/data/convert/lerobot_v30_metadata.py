"""Write LeRobot v3.0's metadata: the parquet tables of episodes and tasks, and the statistics of the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path


def write_tasks30(path: Path, tasks: dict[int, str]) -> None:
    """meta/tasks.parquet as pandas writes a frame whose index is the sentences: `read_parquet` gives it back."""
    name = "__index_level_0__"

    def described(column: str | None, field_name: str, kind: str, numpy_kind: str) -> dict[str, Any]:
        known = {"name": column, "field_name": field_name, "pandas_type": kind, "numpy_type": numpy_kind}
        return known | {"metadata": None}

    pandas = {
        "index_columns": [name],
        "column_indexes": [described(None, "None", "unicode", "object") | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [
            described("task_index", "task_index", "int64", "int64"),
            described(None, name, "unicode", "object"),
        ],
        "creator": {"library": "pyarrow", "version": "0"},
        "pandas_version": "2.0.0",
    }
    schema = pa.schema(
        [pa.field("task_index", pa.int64()), pa.field(name, pa.string())], metadata={"pandas": json.dumps(pandas)}
    )
    numbers = sorted(tasks)
    with atomic_path(path) as partial:
        pq.write_table(pa.table([numbers, [tasks[number] for number in numbers]], schema=schema), partial)


def episodes_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows of equal keys as a table; nested numbers of one column get one type: whole, floating or truth."""
    if not rows:
        raise DataError("A dataset without episodes cannot be written as v3.0", expected="at least one episode")
    columns: dict[str, pa.Array] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        if name.startswith("stats/"):
            kinds = {np.asarray(value).dtype.kind for value in values}
            kind = np.int64 if kinds == {"i"} else bool if kinds == {"b"} else np.float64
            values = [np.asarray(value).astype(kind).tolist() for value in values]
        columns[name] = pa.array(values)
    return pa.table(columns)


def pooled_stats(rows: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """meta/stats.json: min, max, mean, std and count of all episodes together, from those of each.

    Quantiles cannot be pooled from quantiles and are left out; `prts stats` computes them from the rows.
    """
    out: dict[str, dict[str, Any]] = {}
    for key in rows[0]:
        parts = [row[key] for row in rows if key in row]
        count = np.array([part["count"][0] for part in parts], np.float64)
        mean, std = (np.array([part[name] for part in parts], np.float64) for name in ("mean", "std"))
        weight = (count / count.sum()).reshape(-1, *[1] * (mean.ndim - 1))
        center = (weight * mean).sum(0)
        spread = np.sqrt((weight * (std**2 + (mean - center) ** 2)).sum(0))
        out[key] = {
            "min": np.min([np.asarray(part["min"], np.float64) for part in parts], 0).tolist(),
            "max": np.max([np.asarray(part["max"], np.float64) for part in parts], 0).tolist(),
            "mean": center.tolist(),
            "std": spread.tolist(),
            "count": [int(count.sum())],
        }
    return out
