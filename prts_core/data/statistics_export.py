"""Write norm statistics in the forms others read, one folder each: the public PRTS release, openpi, LeRobot.

Nothing of ours reads these files: `norm_stats.json` beside them is what training takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import Normalization
from prts_core.data.convert.lerobot_v30_metadata import pooled_stats
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import FeatureSummary
from prts_core.data.normalize import ACTION, STATE, FeatureStats
from prts_core.data.release_statistics import DatasetStatistics, ReleasedStatistics, write_norm_stats, write_statistics
from prts_core.data.statistics import LEROBOT_QUANTILES, Computed, statistics_name
from prts_core.io.files import write_json


def write_forms(
    folder: Path,
    computed: Computed,
    features: Mapping[str, Any],
    dataset: str,
    normalization: Normalization,
    chunk_length: int | None,
    cameras: Mapping[str, Any] | None = None,
) -> None:
    """features: of the dataset's info.json, for the release's statistics.json. dataset: its name there.

    prts/: norm_stats.json {feature: {min, max, mean, std, q01, q99}} and, where actions are trained relative to the
    state, state_relative_ck<chunk_length>_norm_stats.json belong into a dataset's meta folder, statistics.json into a
    checkpoint's. openpi/: norm_stats.json {"norm_stats": {"state", "actions"}} belongs into one of openpi's asset
    folders. lerobot/: stats.json into a LeRobot v3.0 dataset's meta folder, with what `camera_stats` gives. All but
    prts/norm_stats.json and LeRobot's hold what a policy is normalised by: relative actions where they are trained so.
    """
    trained = computed.trained
    own = {STATE: computed.stats.state, ACTION: computed.stats.action}
    used = {STATE: trained.state, ACTION: trained.action}
    write_norm_stats(folder / "prts" / "norm_stats.json", own)
    if computed.relative is not None and chunk_length is not None:
        write_norm_stats(folder / "prts" / statistics_name(computed.contract, chunk_length), used)
    entry = DatasetStatistics(dict(features), used)
    write_statistics(folder / "prts" / "statistics.json", ReleasedStatistics(normalization, {dataset: entry}))
    record = {"state": _openpi(trained.state), "actions": _openpi(trained.action)}
    write_json(folder / "openpi" / "norm_stats.json", {"norm_stats": record})
    write_json(folder / "lerobot" / "stats.json", _lerobot(computed) | dict(cameras or {}))


def camera_stats(roots: Sequence[Path], split: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """({camera: min, max, mean, std, each (C, 1, 1) in 0-1, and count} pooled over the split's episodes, the cameras
    that cannot be). From meta/episodes_stats.jsonl: no picture is decoded. count: the frames that were sampled there.

    A camera that lacks statistics in one episode, or has them in another shape, is left out. Raises DataError for a
    line that is no statistics.
    """
    rows: list[dict[str, dict[str, Any]]] = []
    keys: list[str] = []
    for root in roots:
        dataset = LeRobotDataset.open(root)
        keys = dataset.camera_keys
        stored = dataset.episode_stats()
        for episode in dataset.episodes(split):
            described = stored[episode].stats if episode in stored else {}
            rows.append(
                {key: described[key].model_dump() for key in keys if key in described and _image(described[key])}
            )
    whole = [key for key in keys if all(key in row for row in rows)]
    if not whole:
        return {}, keys
    return pooled_stats([{key: row[key] for key in whole} for row in rows]), [key for key in keys if key not in whole]


def _image(stats: FeatureSummary) -> bool:
    try:
        shapes = {np.asarray(getattr(stats, name), np.float64).shape for name in ("min", "max", "mean", "std")}
    except (TypeError, ValueError):
        return False
    return len(shapes) == 1 and shapes.pop()[1:] == (1, 1) and stats.count[0] > 0


def _openpi(stats: FeatureStats) -> dict[str, list[float]]:
    return {name: getattr(stats, name).tolist() for name in ("mean", "std", "q01", "q99")}


def _lerobot(computed: Computed) -> dict[str, dict[str, list[float] | list[int]]]:
    rows = computed.rows
    arrays = {"min": rows.low, "max": rows.high, "mean": rows.mean, "std": rows.std}
    arrays |= dict(zip(LEROBOT_QUANTILES, rows.quantiles(tuple(LEROBOT_QUANTILES.values())), strict=True))
    at = len(computed.contract.state)

    def part(which: slice) -> dict[str, list[float] | list[int]]:
        return {name: np.asarray(array[which]).tolist() for name, array in arrays.items()} | {"count": [rows.count]}

    return {STATE: part(slice(None, at)), ACTION: part(slice(at, None))}
