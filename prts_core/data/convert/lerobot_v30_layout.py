"""Read and write LeRobot v3.0's metadata: info.json, and the parquet tables of episodes and tasks, checked when read.

`lerobot_v30` turns such a dataset into v2.1, `lerobot_v30_export` writes one. Source of the layout: what lerobot 0.4.4
writes and reads (tests/conformance/test_lerobot_v30.py holds both against it).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Json, ValidationError
from pydantic import Field as Checked

from prts_core.data.lerobot_v21.schema import AnyInfo, faults
from prts_core.data.lerobot_v21.tables import read_parquet
from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path, read_json

VERSION = "v3.0"
FILES_A_CHUNK = 1000
DATA_MB, VIDEO_MB = 100, 200
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
TASKS_PATH, STATS_PATH = "meta/tasks.parquet", "meta/stats.json"
MORE = "prts/more"  # column of the episodes' table: JSON of what v2.1's line has beyond LeRobot's own fields
_GROUPS = ("data", "videos", "meta", "stats")  # columns such as stats/action/mean


class Info30(AnyInfo):
    """meta/info.json of v3.0; unknown keys are kept."""

    version = VERSION
    path_fields = ("chunk_index", "file_index", "video_key")


class _Place(BaseModel):
    chunk_index: int = Checked(ge=0, strict=True)
    file_index: int = Checked(ge=0, strict=True)


class _Clip(_Place):
    from_timestamp: float = Checked(ge=0, allow_inf_nan=False)
    to_timestamp: Any


class _Row(BaseModel):
    """One row of the episodes' table, its grouped columns nested. more: columns beyond LeRobot's own."""

    episode_index: int = Checked(ge=0, strict=True)
    tasks: list[Annotated[str, Checked(min_length=1)]] = Checked(min_length=1)
    length: int = Checked(ge=1, strict=True)
    dataset_from_index: int
    dataset_to_index: int
    data: _Place
    videos: dict[str, _Clip]
    stats: dict[str, dict[str, Any]]
    packed: Json[dict[str, Any]] | None = None
    more: dict[str, Any]


@dataclass(frozen=True)
class FrameSpan:
    """Where one episode's part lies. start_s: time of its first frame in a video, 0 for tables."""

    file: str
    start_s: float = 0.0


@dataclass(frozen=True)
class Episode30:
    """One row of the episodes' table. first: its first row in the whole dataset. stats: feature -> name -> value."""

    index: int
    tasks: tuple[str, ...]
    length: int
    first: int
    data: FrameSpan
    videos: dict[str, FrameSpan]
    stats: dict[str, dict[str, Any]]
    more: dict[str, Any] = field(default_factory=dict)


def read_info30(root: Path) -> Info30:
    path = root / "meta" / "info.json"
    if not root.is_dir():
        raise DataError("A dataset folder is missing", file=root, expected="a LeRobot v3.0 folder with meta/info.json")
    try:
        return Info30.model_validate(read_json(path))
    except ValidationError as err:
        where, found, expected = faults(err)[0]
        raise DataError(
            "A metadata file does not fit LeRobot v3.0", file=path, field=where, found=found, expected=expected
        ) from err


def read_tasks30(root: Path) -> dict[int, str]:
    """{task_index: sentence}. The sentences are pandas' index, whose column has no fixed name."""
    path = root / TASKS_PATH
    table = read_parquet(path, None)
    texts = [
        name
        for name in table.column_names
        if pa.types.is_string(table.schema.field(name).type) or pa.types.is_large_string(table.schema.field(name).type)
    ]
    if "task_index" not in table.column_names or len(texts) != 1:
        raise DataError(
            "The tasks' table does not fit LeRobot v3.0",
            file=path,
            found=", ".join(table.column_names),
            expected="a column task_index and one of sentences",
        )
    numbers, sentences = table.column("task_index").to_pylist(), table.column(texts[0]).to_pylist()
    if sorted(map(str, numbers)) != sorted(map(str, range(len(numbers)))) or not all(sentences):
        problem = "Tasks are not numbered 0, 1, 2, ..., each with a sentence"
        raise DataError(problem, file=path, field="task_index", found=numbers[:9])
    return dict(sorted(zip(numbers, sentences, strict=True)))


def read_episodes30(root: Path, info: Info30) -> list[Episode30]:
    """Every row of meta/episodes/*/*.parquet in order, held against each other and info.json."""
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        expected = EPISODES_PATH.format(chunk_index=0, file_index=0)
        raise DataError("The episodes' table is missing", file=root / "meta/episodes", expected=expected)
    episodes: list[Episode30] = []
    first = 0
    for path in paths:
        for number, raw in enumerate(read_parquet(path, None).to_pylist()):
            try:
                row = _Row.model_validate(_nested(raw, info))
            except ValidationError as err:
                where, found, expected = faults(err)[0]
                raise _wrong(path, number, where.replace(".", "/"), found, expected) from err
            begin = {"episode_index": len(episodes), "dataset_from_index": first}
            for name, wanted in (begin | {"dataset_to_index": first + row.length}).items():
                if raw[name] != wanted:
                    raise _wrong(path, number, name, raw[name], wanted)
            patterns = dict.fromkeys(info.video_keys, info.video_path or VIDEO_PATH)
            videos = {
                key: FrameSpan(_file(pattern, row.videos[key], video_key=key), row.videos[key].from_timestamp)
                for key, pattern in patterns.items()
            }
            data, more = FrameSpan(_file(info.data_path, row.data)), row.more | (row.packed or {})
            task = tuple(row.tasks)
            episodes.append(Episode30(len(episodes), task, row.length, first, data, videos, row.stats, more))
            first += row.length
    if (len(episodes), first) != (info.total_episodes, info.total_frames):
        raise DataError(
            "Totals contradict the episodes' table",
            file=root / "meta/info.json",
            field="total_episodes, total_frames",
            found=(info.total_episodes, info.total_frames),
            expected=(len(episodes), first),
        )
    return episodes


def _nested(row: dict[str, Any], info: Info30) -> dict[str, Any]:
    """A row as `_Row` checks it; columns without a value are left out of the statistics."""
    out: dict[str, Any] = {"data": {}, "videos": {key: {} for key in info.video_keys}, "stats": {}, "more": {}}
    for name, value in row.items():
        group, _, rest = name.partition("/")
        key, _, part = rest.rpartition("/")
        if name in _Row.model_fields and group not in out:
            out[name] = value
        elif name == MORE:
            out["packed"] = value or None
        elif group == "data":
            out["data"][rest] = value
        elif group == "videos" or (group == "stats" and value is not None):
            out[group].setdefault(key, {})[part] = value
        elif group not in _GROUPS or not rest:
            out["more"][name] = value
    return out


def _file(pattern: str, place: _Place, **names: str) -> str:
    return pattern.format(chunk_index=place.chunk_index, file_index=place.file_index, **names)


def _wrong(path: Path, number: int, name: str, found: object, expected: object) -> DataError:
    return DataError(
        "A row of the episodes' table is wrong",
        file=path,
        field=f"row {number}, {name}",
        found=found,
        expected=expected,
        cure="restore the dataset from its source",
    )


# ---- writing -------------------------------------------------------------------------------------------------------
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
