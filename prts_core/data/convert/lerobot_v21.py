"""Import a LeRobot dataset recorded by others: check, copy, cut to a subset, split, and give it a Contract.

v3.0, v3.1 and what lies in object storage are taken over as they are: `by_reference`. The source is only ever read; one
whose files are missing is refused. `prts validate` judges the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prts_core.config.schema import RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.contract import Contract
from prts_core.data.convert.by_reference import refer
from prts_core.data.convert.foreign import contract_of, require_files, splits_of
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.remote import REMOTE
from prts_core.data.lerobot_v21.schema import (
    CHUNKS_SIZE,
    DATA_PATH,
    STANDARD_FEATURES,
    VIDEO_PATH,
    Info,
    data_file,
    totals,
    video_file,
)
from prts_core.data.lerobot_v21.select import select
from prts_core.data.lerobot_v21.tables import require_columns
from prts_core.data.lerobot_v21.v30 import is_v30
from prts_core.data.lerobot_v21.writer import (
    counters,
    episode_stats,
    numbered,
    remove_strays,
    take_file,
    take_table,
    write_meta,
)
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import read_json, read_jsonl
from prts_core.io.progress import track


def import_dataset(
    root: Path, output: Path, work: Path, *, dataset: str, robot: RobotConfig | None, workers: int
) -> Contract:
    """Copy the whole dataset (see prts_core.data.convert.source.DATASETS). A copied file that has the same content is
    its own record of being finished."""
    work.mkdir(parents=True, exist_ok=True)
    return import_lerobot(
        root, output, dataset=dataset, source=LeRobotSource(kind="lerobot", root=str(root)), robot=robot
    )


def import_lerobot(
    root: Path | str,
    output: Path,
    *,
    dataset: str,
    source: LeRobotSource,
    robot: RobotConfig | None,
    digests: Mapping[str, str] | None = None,
) -> Contract:
    """Import the dataset at `root`, a folder or a URL, into `output` and write meta/contract.json there. digests: as
    `refer`.

    Raises DataError for an absent or incomplete source, ConfigError for a subset or split that does not fit.
    """
    if isinstance(root, str) or (root.is_dir() and (is_v30(root) or (root / REMOTE).is_file())):
        return refer(root, output, dataset=dataset, source=source, robot=robot, digests=digests)
    opened, link = LeRobotDataset.open(root), "copy" if source.link == "auto" else source.link
    info = opened.info
    chosen = _chosen(opened, source, dataset)
    splits = splits_of(info, len(opened.rows), len(chosen), source, dataset)
    selection = select(info, source, root)
    info = selection.info(info)
    contract = contract_of(info, root, dataset, robot)
    files = [path for episode in chosen for path in info.episode_files(episode)]
    require_files(root, files)

    start, kept, stats = 0, [], []
    raw_rows = read_jsonl(root / "meta" / "episodes.jsonl")
    raw_stats = {row.get("episode_index"): row for row in _stats_rows(root)}
    wanted: list[str] = []
    for new, old in enumerate(track(chosen, total=len(chosen), what=f"importing {dataset}")):
        length = opened.rows[old].length
        target = data_file(new)
        wanted.append(target)
        was, path_before = opened.table(old), root / info.data_file(old)
        numbering = counters(new, start, was.num_rows)
        require_columns(was.column_names, numbering, path_before)
        table = numbered(selection.table(was, path_before) if selection.rewrites_tables else was, numbering)
        take_table(path_before, output / target, was, table, link)
        index_stats = {} if table is was else episode_stats(numbering, {k: STANDARD_FEATURES[k] for k in numbering})
        for key in info.video_keys:
            path = video_file(new, key)
            wanted.append(path)
            take_file(root / info.video_file(old, key), output / path, link)
        kept.append(raw_rows[old] | {"episode_index": new})
        if old in raw_stats:
            stats.append({"episode_index": new, "stats": selection.stats(raw_stats[old]["stats"]) | index_stats})
        start += length
    remove_strays(output, wanted)
    lengths = [opened.rows[old].length for old in chosen]
    write_meta(output, _info(info, root, lengths, len(opened.tasks), splits), kept, opened.tasks, stats, contract)
    return contract


def _chosen(opened: LeRobotDataset, source: LeRobotSource, dataset: str) -> list[int]:
    if source.episodes is None:
        return opened.episodes()
    wrong = [index for index in source.episodes if not 0 <= index < len(opened.rows)]
    doubled = len(set(source.episodes)) != len(source.episodes)
    if wrong or doubled or not source.episodes:
        raise ConfigError(
            f"The episodes chosen from dataset {dataset!r} do not fit it",
            field="source.episodes",
            found="an episode named twice" if doubled else (f"episode {wrong[0]}" if wrong else "none"),
            expected=f"different numbers from 0 to {len(opened.rows) - 1}",
        )
    return list(source.episodes)


def _stats_rows(root: Path) -> list[dict[str, Any]]:
    path = root / "meta" / "episodes_stats.jsonl"
    if not path.is_file():
        raise DataError(
            "A dataset lacks its per-episode statistics",
            file=path,
            expected="one line per episode, part of LeRobot v2.1",
            cure="write them with lerobot's convert_dataset_v20_to_v21",
        )
    return read_jsonl(path)


def _info(info: Info, root: Path, lengths: list[int], tasks: int, splits: dict[str, str]) -> dict[str, Any]:
    """info.json as the source has it, with totals, splits and paths made true and nested `names` made flat."""
    raw: dict[str, Any] = read_json(root / "meta" / "info.json")
    features = {}
    for key, feature in info.features.items():
        features[key] = dict(raw["features"].get(key, {}))
        if not feature.is_image:
            features[key] |= {"dtype": feature.dtype, "shape": list(feature.shape), "names": feature.flat_names}
    return raw | {
        "features": features,
        **totals(lengths, tasks, len(info.video_keys)),
        "chunks_size": CHUNKS_SIZE,
        "splits": splits,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if info.video_keys else None,
    }
