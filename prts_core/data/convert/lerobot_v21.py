"""Take over a LeRobot v2.1 dataset recorded by others: check, copy, cut to a subset, split, and give it a Contract.

The source is only ever read. It does not judge the numbers (`prts_core.data.validation` does), but refuses a source
whose files are missing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prts_core.config.schema import RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.contract import Contract
from prts_core.data.embodiment import build_contract
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import ACTION, CHUNKS_SIZE, DATA_PATH, STANDARD_FEATURES, STATE, VIDEO_PATH, Info
from prts_core.data.lerobot_v21.select import Selection, select
from prts_core.data.lerobot_v21.writer import episode_stats, remove_strays, write_meta
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import atomic_path, digest_file, explain_os_errors, read_json, read_jsonl
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
    root: Path,
    output: Path,
    *,
    dataset: str,
    source: LeRobotSource,
    robot: RobotConfig | None,
) -> Contract:
    """Import the dataset at `root` into `output` and write meta/contract.json there.

    Raises DataError for an absent or incomplete source, ConfigError for a subset or split that does not fit.
    """
    opened = LeRobotDataset.open(root)
    info = opened.info
    chosen = _chosen(opened, source, dataset)
    splits = _splits(info, len(opened.rows), len(chosen), source, dataset)
    selection = select(info, source, root)
    info = selection.info(info)
    contract = contract_of(info, dataset, robot)
    files = [path for episode in chosen for path in info.episode_files(episode)]
    _complete(root, files)

    start, kept, stats = 0, [], []
    raw_rows = read_jsonl(root / "meta" / "episodes.jsonl")
    raw_stats = {row.get("episode_index"): row for row in _stats_rows(root)}
    wanted: list[str] = []
    for new, old in enumerate(track(chosen, total=len(chosen), what=f"importing {dataset}")):
        length = opened.rows[old].length
        target = DATA_PATH.format(episode_chunk=new // CHUNKS_SIZE, episode_index=new)
        wanted.append(target)
        index_stats = _take_table(opened, old, output / target, new, start, source.link, selection)
        for key in info.video_keys:
            path = VIDEO_PATH.format(episode_chunk=new // CHUNKS_SIZE, episode_index=new, video_key=key)
            wanted.append(path)
            take_file(root / info.video_file(old, key), output / path, source.link)
        kept.append(raw_rows[old] | {"episode_index": new})
        if old in raw_stats:
            stats.append({"episode_index": new, "stats": selection.stats(raw_stats[old]["stats"]) | index_stats})
        start += length
    remove_strays(output, wanted)
    write_meta(
        output, _info(info, root, len(chosen), start, len(opened.tasks), splits), kept, opened.tasks, stats, contract
    )
    return contract


def contract_of(info: Info, dataset: str, robot: RobotConfig | None) -> Contract:
    """The Contract of an existing dataset: widths and names from its (selected) info.json, meaning from the robot's
    YAML."""
    state, action = info.features[STATE], info.features[ACTION]
    return build_contract(
        dataset=dataset,
        robot=robot,
        robot_type=info.robot_type,
        control_hz=info.fps,
        state_names=state.flat_names,
        state_width=state.shape[0],
        action_names=action.flat_names,
        action_width=action.shape[0],
        cameras={key: info.features[key].image_size for key in info.camera_keys},
    )


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


def _splits(info: Info, available: int, chosen: int, source: LeRobotSource, dataset: str) -> dict[str, str]:
    """The last `heldout_episodes` become heldout; an untouched dataset keeps its own splits."""
    held = source.heldout_episodes
    if held:
        if not 0 < held < chosen:
            raise ConfigError(
                f"Dataset {dataset!r} cannot hold out that many episodes",
                field="source.heldout_episodes",
                found=held,
                expected=f"0 to {chosen - 1}",
            )
        return {"train": f"0:{chosen - held}", "heldout": f"{chosen - held}:{chosen}"}
    if source.episodes is None and "train" in info.splits and chosen == available:
        return dict(info.splits)
    return {"train": f"0:{chosen}"}


def _complete(root: Path, files: Iterable[str]) -> None:
    """Completeness first: lerobot itself would go to the hub for a missing file and die there."""
    missing = [path for path in files if not (root / path).is_file() or (root / path).stat().st_size == 0]
    if missing:
        raise DataError(
            f"A dataset is incomplete: {len(missing)} of its files are missing or empty",
            file=root / missing[0],
            found="no such file" if not (root / missing[0]).exists() else "0 bytes",
            expected="every episode's parquet and videos, as info.json and episodes.jsonl promise",
            cure="download the dataset again, or list the whole episodes in source.episodes",
        )


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


def take_file(old: Path, new: Path, link: Literal["copy", "hardlink"]) -> None:
    """Copy or hardlink one file; one that stands there already with the same content is kept (a cut import goes on)."""
    if new.is_file() and new.stat().st_size == old.stat().st_size and digest_file(new) == digest_file(old):
        return
    with explain_os_errors(new):
        new.parent.mkdir(parents=True, exist_ok=True)
        if link == "hardlink":
            new.unlink(missing_ok=True)
            try:
                os.link(old, new)
                return
            except OSError as err:
                if err.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                    raise  # another file system or protected hard links: copying below does it
        with atomic_path(new) as partial:
            shutil.copyfile(old, partial)


def _take_table(
    dataset: LeRobotDataset,
    taken: int,
    new: Path,
    episode: int,
    start: int,
    link: Literal["copy", "hardlink"],
    selection: Selection,
) -> dict[str, dict[str, list]]:
    """Take over one table; where its numbering differs, rewrite the columns episode_index and index; select columns.

    Returns new statistics of the rewritten columns, {} for an untouched file.
    """
    table, old = dataset.table(taken), dataset.root / dataset.info.data_file(taken)
    numbering = {
        "episode_index": np.full(table.num_rows, episode, np.int64),
        "index": start + np.arange(table.num_rows, dtype=np.int64),
    }
    lacking = [key for key in numbering if key not in table.column_names]
    if lacking:
        raise DataError("A table lacks a column", file=old, field=lacking[0], found=", ".join(table.column_names))
    numbered = all(table.column(key).to_numpy().tolist() == values.tolist() for key, values in numbering.items())
    if numbered and not selection.rewrites_tables:
        take_file(old, new, link)
        return {}
    if selection.rewrites_tables:
        table = selection.table(table, old)
    for key, values in numbering.items():
        table = table.set_column(table.column_names.index(key), table.schema.field(key), pa.array(values))
    with atomic_path(new) as partial:
        pq.write_table(table, partial)
    return episode_stats(numbering, {key: STANDARD_FEATURES[key] for key in numbering})


def _info(info: Info, root: Path, episodes: int, frames: int, tasks: int, splits: dict[str, str]) -> dict[str, Any]:
    """info.json as the source has it, with totals, splits and paths made true and nested `names` made flat."""
    raw: dict[str, Any] = read_json(root / "meta" / "info.json")
    features = {}
    for key, feature in info.features.items():
        features[key] = dict(raw["features"].get(key, {}))
        if not feature.is_image:
            features[key] |= {"dtype": feature.dtype, "shape": list(feature.shape), "names": feature.flat_names}
    return raw | {
        "features": features,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "total_videos": episodes * len(info.video_keys),
        "total_chunks": -(-episodes // CHUNKS_SIZE),
        "chunks_size": CHUNKS_SIZE,
        "splits": splits,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if info.video_keys else None,
    }
