"""Copy LeRobot v3.0 into v2.1: cut its long files into one table and one video an episode; pictures are not encoded.

For whom the layout must be v2.1; what is read where it lies is not copied (`lerobot_v21.import_lerobot`). The way back
is `lerobot_v30_export`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Contract
from prts_core.data.convert.foreign import carried_contract, check_numbering, require_whole
from prts_core.data.convert.remux import Piece, cut
from prts_core.data.convert.resume import Unit, run_units
from prts_core.data.lerobot_v21.reader import LeRobotDataset
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
from prts_core.data.lerobot_v21.tables import write_parquet
from prts_core.data.lerobot_v21.v30 import is_v30
from prts_core.data.lerobot_v21.writer import remove_strays, write_meta
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
    if not is_v30(root):
        problem, cure = "A dataset is not of LeRobot v3.0 or v3.1", "name its kind: --source lerobot_v21"
        raise DataError(problem, file=root / "meta/info.json", field="codebase_version", cure=cure)
    opened = LeRobotDataset.open(root)
    require_whole(opened)
    described = _info21(opened)
    contract = carried_contract(opened, parse(Info, described, root / "meta" / "info.json"), dataset, robot)
    stats = _stats(opened)
    units = [*_table_units(opened, output), *_video_units(opened, output, reencode)]
    run_units(units, work, workers=workers, what=f"cutting {dataset}")
    remove_strays(output, [path.relative_to(output).as_posix() for unit in units for path in unit.outputs])
    write_meta(
        output, described, [row.model_dump(exclude_unset=True) for row in opened.rows], opened.tasks, stats, contract
    )
    return contract


def _info21(opened: LeRobotDataset) -> dict[str, Any]:
    """info.json as the source has it, in the words of v2.1."""
    described: dict[str, Any] = read_json(opened.root / "meta" / "info.json")
    raw = {key: value for key, value in described.items() if key not in _V30_ONLY}
    features = {
        key: feature if feature["dtype"] == "video" else {k: v for k, v in feature.items() if k != "fps"}
        for key, feature in raw["features"].items()
    }
    return raw | {
        "codebase_version": CODEBASE_VERSION,
        **totals(opened.lengths.tolist(), len(opened.tasks), len(opened.info.video_keys)),
        "chunks_size": CHUNKS_SIZE,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if opened.info.video_keys else None,
        "features": features,
    }


def _stats(opened: LeRobotDataset) -> list[dict[str, Any]]:
    """The lines of episodes_stats.jsonl; texts have no statistics."""
    stored = opened.episode_stats()
    keys = [key for key, feature in opened.info.features.items() if feature.dtype not in ("string", "language")]
    lines = []
    for episode in opened.episodes():
        lacking = [f"stats/{key}" for key in keys if key not in stored[episode].stats]
        if lacking:
            raise DataError(
                "An episode lacks its statistics",
                file=opened.root / "meta/episodes",
                field=f"episode {episode}, {lacking[0]}",
                expected="min, max, mean, std and count of every feature",
                cure="write them with lerobot's augment_dataset_quantile_stats",
            )
        lines.append(
            {"episode_index": episode, "stats": {key: stored[episode].stats[key].model_dump() for key in keys}}
        )
    return lines


# ---- tables --------------------------------------------------------------------------------------------------------
def _table_units(opened: LeRobotDataset, output: Path) -> Iterator[Unit]:
    files: dict[str, list[int]] = {}
    for episode in opened.episodes():
        files.setdefault(opened.info.data_file(episode), []).append(episode)
    keys = [key for key, feature in opened.info.features.items() if not feature.is_video]
    for number, (file, inside) in enumerate(files.items()):
        yield Unit(
            name=f"table-{number:06d}",
            sources=(opened.root / file,),
            outputs=tuple(output / data_file(episode) for episode in inside),
            settings=(keys, [[episode, opened.length(episode)] for episode in inside]),
            work=partial(_split_table, opened, inside, output, keys),
        )


def _split_table(opened: LeRobotDataset, episodes: Sequence[int], output: Path, keys: Sequence[str]) -> None:
    """Write the rows of each episode to its own file."""
    for episode in episodes:
        table, path = opened.table(episode, keys), opened.root / opened.info.data_file(episode)
        check_numbering(table, episode, opened.starts[episode], path)
        kept = {key: value for key, value in (table.schema.metadata or {}).items() if key == b"huggingface"}
        with atomic_path(output / data_file(episode)) as partial_file:
            write_parquet(table.select(keys).replace_schema_metadata(kept), partial_file)


# ---- videos --------------------------------------------------------------------------------------------------------
def _video_units(opened: LeRobotDataset, output: Path, reencode: VideoConfig | None) -> Iterator[Unit]:
    info = opened.info
    for camera, key in enumerate(info.video_keys):
        files: dict[str, list[Piece]] = {}
        for episode in opened.episodes():
            start, target = (info.first_frame(episode, key) or 0) / info.fps, output / video_file(episode, key)
            files.setdefault(info.video_file(episode, key), []).append(Piece(start, opened.length(episode), target))
        for number, (file, pieces) in enumerate(files.items()):
            yield Unit(
                name=f"video-{camera:02d}-{number:06d}",
                sources=(opened.root / file,),
                outputs=tuple(piece.output for piece in pieces),
                settings=(info.fps, [[piece.start_s, piece.frames] for piece in pieces], repr(reencode)),
                work=partial(cut, opened.root / file, pieces, info.fps, reencode),
            )
