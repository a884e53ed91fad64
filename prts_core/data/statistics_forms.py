"""Norm statistics in the forms others read, one folder each: the public PRTS release, openpi, LeRobot.

It does not compute them, and nothing of ours reads these files: `norm_stats.json` beside them is what training takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import Normalization
from prts_core.data.normalize import ACTION, STATE, FeatureStats
from prts_core.data.released_statistics import (
    DatasetStatistics,
    ReleasedStatistics,
    write_norm_stats,
    write_statistics,
)
from prts_core.data.statistics import Computed, statistics_name
from prts_core.files import write_json

_LEROBOT_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def write_forms(
    folder: Path,
    made: Computed,
    features: Mapping[str, Any],
    dataset: str,
    normalization: Normalization,
    chunk_length: int | None,
) -> None:
    """features: of the dataset's info.json, for the release's statistics.json. dataset: its name there.

    prts/: norm_stats.json {feature: {min, max, mean, std, q01, q99}} and, where actions are trained relative to the
    state, state_relative_ck<chunk_length>_norm_stats.json belong into a dataset's meta folder, statistics.json into a
    checkpoint's. openpi/: norm_stats.json {"norm_stats": {"state", "actions"}} belongs into one of openpi's asset
    folders. lerobot/: stats.json into a LeRobot v3.0 dataset's meta folder; it knows no cameras, which parquet does not
    hold. All but prts/norm_stats.json and LeRobot's hold what a policy is normalised by: relative actions where they
    are trained so.
    """
    trained = made.trained
    own = {STATE: made.stats.state, ACTION: made.stats.action}
    used = {STATE: trained.state, ACTION: trained.action}
    write_norm_stats(folder / "prts" / "norm_stats.json", own)
    if made.relative is not None and chunk_length is not None:
        write_norm_stats(folder / "prts" / statistics_name(made.contract, chunk_length), used)
    entry = DatasetStatistics(dict(features), used)
    write_statistics(folder / "prts" / "statistics.json", ReleasedStatistics(normalization, {dataset: entry}))
    record = {"state": _openpi(trained.state), "actions": _openpi(trained.action)}
    write_json(folder / "openpi" / "norm_stats.json", {"norm_stats": record})
    write_json(folder / "lerobot" / "stats.json", _lerobot(made))


def _openpi(stats: FeatureStats) -> dict[str, list[float]]:
    return {name: getattr(stats, name).tolist() for name in ("mean", "std", "q01", "q99")}


def _lerobot(made: Computed) -> dict[str, dict[str, list[float] | list[int]]]:
    rows = made.rows
    arrays = {"min": rows.low, "max": rows.high, "mean": rows.mean, "std": rows.std}
    arrays |= dict(zip(_LEROBOT_QUANTILES, rows.quantiles(tuple(_LEROBOT_QUANTILES.values())), strict=True))
    at = len(made.contract.state)

    def part(which: slice) -> dict[str, list[float] | list[int]]:
        return {name: np.asarray(array[which]).tolist() for name, array in arrays.items()} | {"count": [rows.count]}

    return {STATE: part(slice(None, at)), ACTION: part(slice(at, None))}
