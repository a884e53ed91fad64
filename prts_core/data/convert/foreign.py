"""Judge a LeRobot dataset of others before it is taken over: is it whole, what do its numbers mean, its splits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from prts_core.config.schema import RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.contract import Contract
from prts_core.data.embodiment import build_contract
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import ACTION, STATE, Info
from prts_core.data.lerobot_v21.tables import require_columns
from prts_core.data.lerobot_v21.writer import counters
from prts_core.io.errors import ConfigError, DataError


def contract_of(info: Info, root: Path, dataset: str, robot: RobotConfig | None) -> Contract:
    """The Contract of an existing dataset: widths and names from its (selected) info.json, meaning from the robot's
    YAML. DataError where state or action is lacking."""
    for key in (STATE, ACTION):
        if key not in info.features:
            problem, found = "A dataset lacks a column that every robot's dataset has", ", ".join(info.features)
            raise DataError(problem, file=root / "meta" / "info.json", field="features", found=found, expected=key)
    state, action = (info.features[key].dimension_names for key in (STATE, ACTION))
    return build_contract(
        dataset=dataset,
        robot=robot,
        robot_type=info.robot_type,
        control_hz=info.fps,
        state=state,
        action=action,
        cameras={key: info.features[key].image_size for key in info.camera_keys},
    )


def require_whole(opened: LeRobotDataset) -> None:
    """Refuse a dataset of which files are missing, or whose episodes are of tasks that it does not name."""
    root, info = opened.root, opened.info
    files = dict.fromkeys(file for episode in opened.episodes() for file in info.episode_files(episode))
    if opened.remote is None:
        require_files(root, files)
    elif lacking := sorted(set(files) - opened.remote.listing().keys()):
        problem, cure = "A dataset is incomplete", "upload the file, or correct the URL"
        found = f"{len(lacking)} files are missing"
        raise DataError(problem, file=f"{opened.remote.url}/{lacking[0]}", found=found, cure=cure)
    known = set(opened.tasks.values())
    for row in opened.rows:
        if unknown := set(row.tasks) - known:
            problem = f"An episode names a task that {info.tables['tasks']} does not have"
            where = f"episode {row.episode_index}, tasks"
            raise DataError(problem, file=root / info.tables["episodes"], field=where, found=min(unknown))


def carried_contract(opened: LeRobotDataset, info: Info, dataset: str, robot: RobotConfig | None) -> Contract:
    """The Contract that the dataset has already, where no robot is named; else that of its features."""
    carried = opened.root / "meta" / "contract.json"
    return opened.contract if robot is None and carried.is_file() else contract_of(info, opened.root, dataset, robot)


def splits_of(info: Info, available: int, chosen: int, source: LeRobotSource, dataset: str) -> dict[str, str]:
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


def require_files(root: Path, files: Iterable[str]) -> None:
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
