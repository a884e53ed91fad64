"""What statistics are held against: rows in memory, described in one pass."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prts_core.config.model import Compat
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.normalize import FeatureStats


def describe(values: np.ndarray, compat: Compat = "none") -> FeatureStats:
    """FeatureStats of (rows, D) values in memory, computed in float64: what `compute` is held against.

    compat "prts": in float32 as the public release does, where the std of a constant is not 0 but rounding.
    """
    wide: np.ndarray = values.astype(np.float32 if compat == "prts" else np.float64)
    q01, q99 = np.quantile(wide, 0.01, axis=0), np.quantile(wide, 0.99, axis=0)
    parts = (wide.mean(0), wide.std(0), wide.min(0), wide.max(0), q01, q99)
    return FeatureStats(*(part.astype(np.float64) for part in parts))


def rows_of(dataset: LeRobotDataset, episodes: Iterable[int], key: str = "action") -> np.ndarray:
    """A column of several episodes, one after another."""
    return np.concatenate([dataset.columns(episode, [key])[key] for episode in episodes])
