"""Turn LeRobot v3.0 into v2.1: cut its long files into one table and one video an episode; pictures are not encoded.

The way back is `lerobot_v30_export`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Contract
from prts_core.data.convert.lerobot_v21 import contract_of
from prts_core.data.convert.lerobot_v30_layout import Episode30, Info30, read_episodes30, read_info30, read_tasks30
from prts_core.data.convert.remux import Piece, cut
from prts_core.data.convert.resume import Unit, run_units
from prts_core.data.lerobot_v21.schema import (
    CHUNKS_SIZE,
    CODEBASE_VERSION,
    DATA_PATH,
    VIDEO_PATH,
    Info,
    data_file,
    parse,
    totals,
    video_file,
)
from prts_core.data.lerobot_v21.seal import check_sizes
from prts_core.data.lerobot_v21.tables import require_columns, write_parquet
from prts_core.data.lerobot_v21.writer import counters, remove_strays, write_meta
from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path, read_json

_ROWS = 256  # rows read at once: with images in the table some 100 MB
_V30_ONLY = ("data_files_size_in_mb", "video_files_size_in_mb")


def import_dataset(
    root: Path,
    output: Path,
    work: Path,
    *,
    dataset: str,
    robot: RobotConfig | None,
    workers: int,
    reencode: VideoConfig | None = None,
) -> Contract:
    """Write the LeRobot v3.0 dataset `root` as the v2.1 dataset `output`, with its Contract; `root` is only read.

    work: folder of resume records; what stands there is not written again. reencode: how to encode episodes whose
    video does not begin at a keyframe (lerobot writes none such, but joins by other tools do); without it they are
    refused. Without a robot, a dataset that carries a Contract keeps it. Raises DataError for a dataset that breaks the
    layout or lacks files.
    """
    check_sizes(root)
    info = read_info30(root)
    episodes, tasks = read_episodes30(root, info), read_tasks30(root)
    info21 = _info21(root, info, [episode.length for episode in episodes], len(tasks))
    described = parse(Info, info21, root / "meta" / "info.json")
    carried = root / "meta" / "contract.json"
    carries = robot is None and carried.is_file()
    contract = Contract.load(carried) if carries else contract_of(described, root, dataset, robot)
    stats = [_stats_row(root, info, episode) for episode in episodes]
    _known_tasks(root, episodes, tasks)
    units = [*_table_units(root, output, info, episodes), *_video_units(root, output, info, episodes, reencode)]
    run_units(units, work, workers=workers, what=f"cutting {dataset}")
    remove_strays(output, [path.relative_to(output).as_posix() for unit in units for path in unit.outputs])
    rows = [
        {"episode_index": episode.index, "tasks": list(episode.tasks), "length": episode.length} | episode.more
        for episode in episodes
    ]
    write_meta(output, info21, rows, tasks, stats, contract)
    return contract


def _info21(root: Path, info: Info30, lengths: list[int], tasks: int) -> dict[str, Any]:
    """info.json as the source has it, in the words of v2.1."""
    described: dict[str, Any] = read_json(root / "meta" / "info.json")
    raw = {key: value for key, value in described.items() if key not in _V30_ONLY}
    features = {
        key: feature if feature["dtype"] == "video" else {k: v for k, v in feature.items() if k != "fps"}
        for key, feature in raw["features"].items()
    }
    return raw | {
        "codebase_version": CODEBASE_VERSION,
        **totals(lengths, tasks, len(info.video_keys)),
        "chunks_size": CHUNKS_SIZE,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if info.video_keys else None,
        "features": features,
    }


def _stats_row(root: Path, info: Info30, episode: Episode30) -> dict[str, Any]:
    lacking = [
        f"stats/{key}/{name}"
        for key in info.features
        for name in ("min", "max", "mean", "std", "count")
        if name not in episode.stats.get(key, {})
    ]
    if lacking:
        raise DataError(
            "An episode lacks its statistics",
            file=root / "meta/episodes",
            field=f"episode {episode.index}, {lacking[0]}",
            expected="min, max, mean, std and count of every feature",
            cure="write them with lerobot's augment_dataset_quantile_stats",
        )
    return {"episode_index": episode.index, "stats": {key: episode.stats[key] for key in info.features}}


def _known_tasks(root: Path, episodes: Sequence[Episode30], tasks: dict[int, str]) -> None:
    known = set(tasks.values())
    for episode in episodes:
        unknown = set(episode.tasks) - known
        if unknown:
            problem = "An episode names a task that meta/tasks.parquet does not have"
            where = f"episode {episode.index}, tasks"
            raise DataError(problem, file=root / "meta/episodes", field=where, found=min(unknown))


# ---- tables --------------------------------------------------------------------------------------------------------
def _table_units(root: Path, output: Path, info: Info30, episodes: Sequence[Episode30]) -> Iterator[Unit]:
    files: dict[str, list[Episode30]] = {}
    for episode in episodes:
        files.setdefault(episode.data.file, []).append(episode)
    keys = [key for key, feature in info.features.items() if not feature.is_video]
    for number, (file, inside) in enumerate(files.items()):
        targets = [output / data_file(episode.index) for episode in inside]
        yield Unit(
            name=f"table-{number:06d}",
            sources=(root / file,),
            outputs=tuple(targets),
            settings=(keys, [[episode.index, episode.length] for episode in inside]),
            work=partial(split_table, root / file, inside, targets, keys),
        )


def split_table(path: Path, episodes: Sequence[Episode30], targets: Sequence[Path], keys: Sequence[str]) -> None:
    """Write the rows of each episode to its own file; one episode is in memory at a time.

    Raises DataError where the file's rows are not these episodes, one after another.
    """
    expected = sum(episode.length for episode in episodes)
    try:
        with pq.ParquetFile(path) as file:
            require_columns(file.schema_arrow.names, keys, path)
            if file.metadata.num_rows != expected:
                problem, cure = "A table does not hold what the metadata says", "restore the dataset from its source"
                rows = file.metadata.num_rows
                raise DataError(problem, file=path, field="rows", found=rows, expected=expected, cure=cure)
            kept = b"huggingface"
            metadata = {key: value for key, value in (file.schema_arrow.metadata or {}).items() if key == kept}
            batches = file.iter_batches(_ROWS, columns=list(keys), use_threads=False)
            held: list[pa.RecordBatch] = []
            for episode, target in zip(episodes, targets, strict=True):
                while sum(len(batch) for batch in held) < episode.length:
                    held.append(next(batches))
                table = pa.Table.from_batches(held)
                mine, rest = table.slice(0, episode.length), table.slice(episode.length)
                held = rest.to_batches()
                check_numbering(mine, episode.index, episode.first, path)
                with atomic_path(target) as partial_file:
                    write_parquet(mine.select(keys).replace_schema_metadata(metadata), partial_file)
    except (pa.ArrowException, OSError) as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise  # the disk, not the table: files.explain_os_errors has words for it
        raise DataError(
            "A table cannot be read: it is truncated or damaged",
            file=path,
            found=" ".join(str(err).split())[:200],
            expected="a whole parquet file",
            cure="restore it from its source",
        ) from err


def check_numbering(table: pa.Table, episode: int, first: int, path: Path) -> None:
    """Refuse a table whose episode_index and index are not those of `episode`, whose first row is `first`."""
    for key, expected in counters(episode, first, table.num_rows).items():
        require_columns(table.column_names, [key], path)
        wrong = np.flatnonzero(table.column(key).to_numpy() != expected)
        if len(wrong):
            raise DataError(
                "Rows of a table are numbered wrongly",
                file=path,
                field=f"{key}, row {wrong[0]} of episode {episode}",
                found=table.column(key)[int(wrong[0])].as_py(),
                expected=int(expected[wrong[0]]),
                cure="`prts validate --fix` numbers a v2.1 dataset anew; restore a v3.0 one from its source",
            )


# ---- videos --------------------------------------------------------------------------------------------------------
def _video_units(
    root: Path, output: Path, info: Info30, episodes: Sequence[Episode30], reencode: VideoConfig | None
) -> Iterator[Unit]:
    for camera, key in enumerate(info.video_keys):
        files: dict[str, list[Piece]] = {}
        for episode in episodes:
            place, target = episode.videos[key], output / video_file(episode.index, key)
            files.setdefault(place.file, []).append(Piece(place.start_s, episode.length, target))
        for number, (file, pieces) in enumerate(files.items()):
            yield Unit(
                name=f"video-{camera:02d}-{number:06d}",
                sources=(root / file,),
                outputs=tuple(piece.output for piece in pieces),
                settings=(info.fps, [[piece.start_s, piece.frames] for piece in pieces], repr(reencode)),
                work=partial(cut, root / file, pieces, info.fps, reencode),
            )
