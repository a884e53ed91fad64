"""Read the metadata of LeRobot v3.0 and v3.1, whose tables and videos hold several episodes each.

v3.1 is v3.0 with columns of language, which are left alone. Source of the layout: what lerobot 0.4.4 writes and reads
(tests/conformance/test_lerobot_v30.py holds both against it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PrivateAttr

from prts_core.data.lerobot_v21.schema import EpisodeRow, EpisodeStatsRow, Info, parse
from prts_core.data.lerobot_v21.tables import read_parquet
from prts_core.io.errors import DataError
from prts_core.io.files import read_json

VERSION, VERSIONS = "v3.0", ("v3.0", "v3.1")
FILES_A_CHUNK = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
TASKS_PATH, STATS_PATH = "meta/tasks.parquet", "meta/stats.json"
MORE = "prts/more"  # column of the episodes' table: JSON of what v2.1's line has beyond LeRobot's own fields
_GROUPS = ("data", "videos", "meta", "stats")  # columns such as stats/action/mean
_COUNTERS = ("dataset_from_index", "dataset_to_index")
_OFF = 0.25  # of a frame: times are sums of durations that writers round
_RESTORE = "restore the dataset from its source"


@dataclass(frozen=True)
class Place:
    """Where each episode's part of one kind of file lies: files (E, 2) chunk and number, first (E,) row or frame."""

    files: np.ndarray
    first: np.ndarray

    def named(self, pattern: str, episode: int, **more: str) -> str:
        chunk, number = self.files[episode].tolist()
        return pattern.format(chunk_index=chunk, file_index=number, **more)


class Info30(Info):
    """meta/info.json of v3.0 and v3.1, with the places that the episodes' table gives; unknown keys are kept."""

    chunks_size: int = Field(default=FILES_A_CHUNK, ge=1)
    versions = VERSIONS
    path_fields = ("chunk_index", "file_index", "video_key")
    tables = {"episodes": "meta/episodes", "tasks": TASKS_PATH, "episodes_stats": "meta/episodes"}
    _lengths: np.ndarray = PrivateAttr()
    _data: Place = PrivateAttr()
    _videos: dict[str, Place] = PrivateAttr()

    def place(self, lengths: np.ndarray, data: Place, videos: dict[str, Place]) -> None:
        self._lengths, self._data, self._videos = lengths, data, videos

    def counted(self, lengths: Any, tasks: int) -> dict[str, int]:
        counted = super().counted(lengths, tasks)
        return {name: counted[name] for name in ("total_episodes", "total_frames", "total_tasks")}

    def data_file(self, episode: int) -> str:
        return self._data.named(self.data_path, episode)

    def data_rows(self, episode: int) -> range | None:
        first = int(self._data.first[episode])
        return range(first, first + int(self._lengths[episode]))

    def data_name(self, episode: int) -> str:
        return f"{self.data_file(episode)}, episode {episode}"

    def first_frame(self, episode: int, key: str) -> int | None:
        return int(self._videos[key].first[episode])

    def video_file(self, episode: int, key: str) -> str:
        return self._videos[key].named(self.video_path or VIDEO_PATH, episode, video_key=key)

    def video_name(self, episode: int, key: str) -> str:
        return f"{self.video_file(episode, key)}, episode {episode}"


@dataclass(frozen=True)
class Episodes30:
    """The episodes' table without its statistics. lengths: (E,) rows of each."""

    info: Info30
    lengths: np.ndarray
    table: pa.Table
    path: Path

    def rows(self) -> tuple[EpisodeRow, ...]:
        """As lines of v2.1: with what `MORE` and other writers' columns add."""
        known = ("episode_index", "tasks", "length")
        others = [name for name in self.table.column_names if name.partition("/")[0] not in _GROUPS]
        rows = []
        for number, raw in enumerate(self.table.select(others).to_pylist()):
            more = {key: value for key, value in raw.items() if key not in (*known, *_COUNTERS, MORE)}
            try:
                more |= json.loads(raw.get(MORE) or "{}")
            except (ValueError, TypeError) as err:
                raise wrong(self.path, number, MORE, raw[MORE], "a JSON object") from err
            line = {key: raw[key] for key in known} | more
            rows.append(parse(EpisodeRow, line, self.path, number, self.info.codebase_version))
        return tuple(rows)


def is_v30(root: Path) -> bool:
    """Whether meta/info.json names one of `VERSIONS`."""
    raw = read_json(root / "meta" / "info.json")
    return isinstance(raw, dict) and raw.get("codebase_version") in VERSIONS


def read_v30(root: Path) -> Episodes30:
    """info.json and the episodes' table, held against each other; DataError for the first fault."""
    file = root / "meta" / "info.json"
    info = parse(Info30, read_json(file), file, version=VERSION)
    parts: list[pa.Table] = []
    lengths: list[np.ndarray] = []
    files: list[np.ndarray] = []
    videos: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {key: [] for key in info.video_keys}
    episodes = rows = 0
    for path in episode_tables(root):
        table = _without_statistics(path)
        length = _integers(table, "length", path, least=1)
        starts = rows + np.cumsum(length) - length
        counted = (episodes + np.arange(len(length)), starts, starts + length)
        for name, expected in zip(("episode_index", *_COUNTERS), counted, strict=True):
            found = _integers(table, name, path)
            if len(bad := np.flatnonzero(found != expected)):
                raise wrong(path, int(bad[0]), name, int(found[bad[0]]), int(expected[bad[0]]))
        _require_tasks(table, path)
        parts.append(table)
        lengths.append(length)
        files.append(_files(table, "data", path))
        for key, places in videos.items():
            places.append((_files(table, f"videos/{key}", path), _frames(table, key, info.fps, path)))
        episodes, rows = episodes + len(length), rows + int(length.sum())
    if (episodes, rows) != (info.total_episodes, info.total_frames):
        raise DataError(
            "Totals contradict the episodes' table",
            file=file,
            field="total_episodes, total_frames",
            found=(info.total_episodes, info.total_frames),
            expected=(episodes, rows),
            cure=_RESTORE,
        )
    counts = np.concatenate(lengths)
    clips = {key: Place(*(np.concatenate(part) for part in zip(*found, strict=True))) for key, found in videos.items()}
    info.place(counts, _rows_in_files(np.concatenate(files), counts, root), clips)
    return Episodes30(info, counts, pa.concat_tables(parts, promote_options="permissive"), root / "meta" / "episodes")


def episode_tables(root: Path) -> list[Path]:
    """The files of the episodes' table, in order."""
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        expected = EPISODES_PATH.format(chunk_index=0, file_index=0)
        raise DataError("The episodes' table is missing", file=root / "meta/episodes", expected=expected, cure=_RESTORE)
    return paths


def read_tasks30(root: Path) -> dict[int, str]:
    """{task_index: sentence}. The sentences are pandas' index, whose column has no fixed name."""
    path = root / TASKS_PATH
    table = read_parquet(path)
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


def read_stats30(root: Path) -> Iterator[EpisodeStatsRow]:
    """The statistics of each episode, as lines of v2.1's episodes_stats.jsonl; what has no value is left out."""
    for path in episode_tables(root):
        names = [n for n in pq.read_schema(path).names if n == "episode_index" or n.startswith("stats/")]
        for number, raw in enumerate(read_parquet(path, names).to_pylist()):
            stats: dict[str, dict[str, Any]] = {}
            for name, value in raw.items():
                key, _, part = name.removeprefix("stats/").rpartition("/")
                if key and value is not None:
                    stats.setdefault(key, {})[part] = value
            line = {"episode_index": raw["episode_index"], "stats": stats}
            yield parse(EpisodeStatsRow, line, path, number, VERSION)


# ---- columns of the episodes' table ---------------------------------------------------------------------------------
def _without_statistics(path: Path) -> pa.Table:
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError):
        names = []  # read_parquet has words for it
    return read_parquet(path, [name for name in names if not name.startswith("stats/")] or None)


def _integers(table: pa.Table, name: str, path: Path, least: int = 0) -> np.ndarray:
    """(E,) int64; a DataError for a column that is missing, or a cell that is no whole number of at least `least`."""
    if name not in table.column_names:
        raise wrong(path, 0, name, "no such column", "a whole number")
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        number = next((n for n, v in enumerate(column.to_pylist()) if not isinstance(v, int)), 0)
        raise wrong(path, number, name, column[number].as_py() if len(column) else column.type, "a whole number")
    values = column.to_numpy().astype(np.int64)
    if len(bad := np.flatnonzero(values < least)):
        raise wrong(path, int(bad[0]), name, int(values[bad[0]]), f"at least {least}")
    return values


def _files(table: pa.Table, group: str, path: Path) -> np.ndarray:
    return np.stack([_integers(table, f"{group}/{name}", path) for name in ("chunk_index", "file_index")], axis=1)


def _frames(table: pa.Table, key: str, fps: float, path: Path) -> np.ndarray:
    """(E,) number of the first frame in its video, from its time."""
    name = f"videos/{key}/from_timestamp"
    if name not in table.column_names:
        raise wrong(path, 0, name, "no such column", "seconds")
    seconds = np.array([np.nan if v is None else v for v in table.column(name).to_pylist()], np.float64)
    frames = seconds * fps
    off = ~(np.isfinite(frames) & (frames > -_OFF) & (np.abs(frames - np.rint(frames)) <= _OFF))
    if len(bad := np.flatnonzero(off)):
        raise wrong(path, int(bad[0]), name, float(seconds[bad[0]]), f"a multiple of 1 / {fps:g} s")
    return np.rint(frames).astype(np.int64)


def _rows_in_files(files: np.ndarray, lengths: np.ndarray, root: Path) -> Place:
    """The episodes of a table follow one another. files: (E, 2); lengths: (E,) rows of each."""
    begins = np.flatnonzero(np.r_[True, (files[1:] != files[:-1]).any(1)])
    if len(np.unique(files[begins], axis=0)) != len(begins):
        raise DataError(
            "Episodes of one table do not follow one another",
            file=root / "meta/episodes",
            field="data/file_index",
            expected="each table once, in the order of the episodes",
            cure=_RESTORE,
        )
    starts = np.cumsum(lengths) - lengths
    return Place(files, starts - np.repeat(starts[begins], np.diff(np.r_[begins, len(files)])))


def _require_tasks(table: pa.Table, path: Path) -> None:
    column = table.column("tasks").to_pylist() if "tasks" in table.column_names else [None]
    for number, tasks in enumerate(column):
        if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) and task for task in tasks):
            raise wrong(path, number, "tasks", tasks, "at least one sentence")


def wrong(path: Path, number: int, name: str, found: object, expected: object) -> DataError:
    return DataError(
        "A row of the episodes' table is wrong",
        file=path,
        field=f"row {number}, {name}",
        found=found,
        expected=expected,
        cure=_RESTORE,
    )
