"""Turn LeRobot v2.1 into v3.0, for tools that read only that: join episodes into long files, pictures as they are.

The way back is `lerobot_v30`. A new file begins where the size is reached, and where the next episode has other column
types or another codec header, since one file holds one of each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from prts_core.data.convert.foreign import check_numbering
from prts_core.data.convert.lerobot_v30_metadata import episodes_table, pooled_stats, write_tasks30
from prts_core.data.convert.remux import codec_key, join
from prts_core.data.convert.resume import Unit, run_units
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import CODEBASE_VERSION
from prts_core.data.lerobot_v21.seal import SEAL, check_sizes, seal
from prts_core.data.lerobot_v21.tables import append_table, opened_table, parquet_writer, read_parquet
from prts_core.data.lerobot_v21.v30 import (
    DATA_PATH,
    EPISODES_PATH,
    FILES_A_CHUNK,
    MORE,
    STATS_PATH,
    TASKS_PATH,
    VERSION,
    VIDEO_PATH,
)
from prts_core.data.lerobot_v21.writer import remove_strays
from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path, read_json, read_jsonl, write_text

DATA_MB, VIDEO_MB = 100, 200  # lerobot's own
_V21_ONLY = ("total_videos", "total_chunks")
_OWN = ("episode_index", "tasks", "length")


def export(
    root: Path, output: Path, work: Path, *, workers: int = 2, data_mb: float = DATA_MB, video_mb: float = VIDEO_MB
) -> None:
    """Write the v2.1 dataset `root` as the v3.0 dataset `output`; `root` is only read.

    work: folder of resume records; files that stand there are not written again. data_mb, video_mb: about how long a
    file becomes (tables by their size in memory, as lerobot counts). Raises DataError for a dataset that is incomplete
    or breaks the laws that v3.0 rests on.
    """
    check_sizes(root)
    dataset = LeRobotDataset.open(root)
    if dataset.info.codebase_version != CODEBASE_VERSION:
        raise DataError(
            "Only a dataset of LeRobot v2.1 is turned into v3.0",
            file=root / "meta/info.json",
            field="codebase_version",
            found=dataset.info.codebase_version,
            cure="use it as it is",
        )
    info = dataset.info
    stats = _stats(root, dataset)
    if sorted(dataset.tasks) != list(range(len(dataset.tasks))):
        raise DataError(
            "Tasks are not numbered 0, 1, 2, ..., and v3.0 finds a task by its place in the table",
            file=root / "meta/tasks.jsonl",
            field="task_index",
            found=sorted(dataset.tasks)[:9],
        )
    raw = read_jsonl(root / "meta/episodes.jsonl")
    firsts = dataset.starts
    rows: list[dict[str, Any]] = [{"episode_index": episode} for episode in dataset.episodes()]
    units = [
        *_table_units(dataset, output, firsts, rows, data_mb),
        *(unit for key in info.video_keys for unit in _video_units(dataset, output, key, rows, video_mb)),
    ]
    (output / SEAL).unlink(missing_ok=True)  # of an earlier run: what is not finished is not sealed
    run_units(units, work, workers=workers, what=f"joining {root.name}")
    remove_strays(output, [path.relative_to(output).as_posix() for unit in units for path in unit.outputs])

    extra = [{key: value for key, value in line.items() if key not in _OWN} for line in raw]
    for row, line, more, part in zip(rows, raw, extra, stats, strict=True):
        row |= {"tasks": line["tasks"], "length": line["length"]}
        if any(extra):
            row[MORE] = json.dumps(more, sort_keys=True, ensure_ascii=False)
        row |= {f"stats/{key}/{name}": value for key, values in part.items() for name, value in values.items()}
    _write_episodes(output, rows, data_mb)
    write_tasks30(output / TASKS_PATH, dataset.tasks)
    write_text(output / STATS_PATH, json.dumps(pooled_stats(stats), indent=4, allow_nan=False))
    contract = root / "meta" / "contract.json"
    if contract.is_file():
        with atomic_path(output / "meta" / "contract.json") as copied:
            shutil.copyfile(contract, copied)
    described = {key: value for key, value in read_json(root / "meta/info.json").items() if key not in _V21_ONLY}
    described |= {
        "codebase_version": VERSION,
        "chunks_size": FILES_A_CHUNK,
        "data_files_size_in_mb": data_mb,
        "video_files_size_in_mb": video_mb,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if info.video_keys else None,
    }
    write_text(output / "meta/info.json", json.dumps(described, indent=4, ensure_ascii=False, allow_nan=False))
    seal(output)


def _stats(root: Path, dataset: LeRobotDataset) -> list[dict[str, dict[str, Any]]]:
    """Every episode's statistics, of the same features and names in each: the table has one column for each."""
    known = dataset.episode_stats()
    joined: list[dict[str, dict[str, Any]]] = []
    for episode in dataset.episodes():
        found = known.get(episode)
        part = {key: value.model_dump() for key, value in found.stats.items()} if found else {}
        shape = {key: set(value) for key, value in part.items()}
        if not part or (joined and shape != {key: set(value) for key, value in joined[0].items()}):
            raise DataError(
                "An episode lacks statistics, or has others than the first",
                file=root / "meta/episodes_stats.jsonl",
                field=f"episode {episode}",
                found=", ".join(part) or "none",
                expected=", ".join(joined[0]) if joined else "every feature's",
                cure="write them anew with `prts validate --fix`",
            )
        joined.append(part)
    return joined


def _files(sizes: Sequence[float], kinds: Sequence[Hashable], limit: float) -> list[list[int]]:
    """Episodes of each file: as many as fit below `limit`, of one kind; an episode is never divided."""
    joined: list[list[int]] = []
    size = 0.0
    for episode, (more, kind) in enumerate(zip(sizes, kinds, strict=True)):
        if not joined or size + more > limit or kind != kinds[joined[-1][-1]]:
            joined.append([])
            size = 0.0
        joined[-1].append(episode)
        size += more
    return joined


def _place(number: int) -> dict[str, int]:
    return {"chunk_index": number // FILES_A_CHUNK, "file_index": number % FILES_A_CHUNK}


def _table_units(
    dataset: LeRobotDataset, output: Path, firsts: Sequence[int], rows: list[dict[str, Any]], limit_mb: float
) -> list[Unit]:
    sizes, kinds = [], []
    for episode in dataset.episodes():
        path = dataset.root / dataset.info.data_file(episode)
        read_parquet(path, [])  # a damaged file is named here, with a cure
        with opened_table(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            sizes.append(sum(group.total_byte_size for group in groups) / 2**20)
            kinds.append(str(file.schema_arrow.remove_metadata()))
    units = []
    for number, inside in enumerate(_files(sizes, kinds, limit_mb)):
        target = output / DATA_PATH.format(**_place(number))
        for episode in inside:
            rows[episode] |= {f"data/{key}": value for key, value in _place(number).items()}
            rows[episode]["dataset_from_index"] = firsts[episode]
            rows[episode]["dataset_to_index"] = firsts[episode] + dataset.length(episode)
        units.append(
            Unit(
                name=f"table-{number:06d}",
                sources=tuple(dataset.root / dataset.info.data_file(episode) for episode in inside),
                outputs=(target,),
                settings=([[episode, firsts[episode], dataset.length(episode)] for episode in inside],),
                work=partial(_join_tables, dataset, inside, [firsts[episode] for episode in inside], target),
            )
        )
    return units


def _join_tables(dataset: LeRobotDataset, episodes: Sequence[int], firsts: Sequence[int], target: Path) -> None:
    """A row group begins with each episode, so that a reader finds it without reading the others."""
    with atomic_path(target) as partial_file:
        writer = None
        try:
            for episode, first in zip(episodes, firsts, strict=True):
                table = dataset.table(episode)
                check_numbering(table, episode, first, dataset.root / dataset.info.data_file(episode))
                writer = writer or parquet_writer(partial_file, table.schema)
                append_table(writer, table.cast(writer.schema))
        finally:
            if writer is not None:
                writer.close()


def _video_units(
    dataset: LeRobotDataset, output: Path, key: str, rows: list[dict[str, Any]], limit_mb: float
) -> list[Unit]:
    paths = [dataset.root / dataset.info.video_file(episode, key) for episode in dataset.episodes()]
    sizes = [path.stat().st_size / 2**20 for path in paths]
    units = []
    for number, inside in enumerate(_files(sizes, [codec_key(path) for path in paths], limit_mb)):
        place = _place(number)
        target = output / VIDEO_PATH.format(video_key=key, **place)
        lengths = [dataset.length(episode) for episode in inside]
        before = 0
        for episode, length in zip(inside, lengths, strict=True):
            times = {"from_timestamp": before / dataset.fps, "to_timestamp": (before + length) / dataset.fps}
            rows[episode] |= {f"videos/{key}/{name}": value for name, value in (place | times).items()}
            before += length
        sources = tuple(paths[episode] for episode in inside)
        work: Callable[[], None] = partial(join, sources, lengths, target, dataset.fps)
        units.append(Unit(f"video-{key}-{number:06d}", sources, (target,), (lengths, dataset.fps), work))
    return units


def _write_episodes(output: Path, rows: list[dict[str, Any]], limit_mb: float) -> None:
    """meta/episodes: as few files as `limit_mb` allows; every row names the file that it stands in."""
    for old in sorted((output / "meta/episodes").glob("*/*.parquet")):
        old.unlink()
    size_mb = episodes_table(rows).nbytes / 2**20
    step = max(1, int(len(rows) * limit_mb / max(size_mb, limit_mb)))
    for row_number, row in enumerate(rows):
        row |= {f"meta/episodes/{key}": value for key, value in _place(row_number // step).items()}
    whole = episodes_table(rows)
    for number, start in enumerate(range(0, len(rows), step)):
        with atomic_path(output / EPISODES_PATH.format(**_place(number))) as partial_file:
            pq.write_table(whole.slice(start, step), partial_file)
