"""Read and write statistics files of the public PRTS release: a checkpoint's statistics.json, and write a dataset's
meta/norm_stats.json (meta/state_relative_ck<chunk>_norm_stats.json has the same form).

statistics.json: {state_mode, features, stats, datasets: {repo_id: {features, stats}}}, where the top level repeats the
first dataset. The other: {feature: {min, max, mean, std, q01, q99}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from prts_core.contract import Normalization
from prts_core.data.lerobot_v21.schema import faults
from prts_core.data.normalize import ACTION, STATE, STATISTICS, FeatureStats, NormStats
from prts_core.io.errors import CheckpointError, DataError, lookup
from prts_core.io.files import digest_value, read_json, write_json, write_text


@dataclass(frozen=True)
class DatasetStatistics:
    """features: as in the dataset's info.json. stats: of every state and action feature, in robot units."""

    features: dict[str, Any]
    stats: dict[str, FeatureStats]

    def norm_stats(self) -> NormStats:
        """State and action as our own record: features "observation.state*" and "action*" joined in file order. How
        many rows they come from is not recorded: count 0. Raises DataError where one of the two is absent."""
        joined = {}
        for prefix in (STATE, ACTION):
            parts = [stats for key, stats in self.stats.items() if key.startswith(prefix)]
            if not parts:
                raise DataError(
                    "Statistics lack a feature",
                    field=prefix,
                    found=", ".join(self.stats),
                    expected=f"{prefix}...",
                    cure="take the statistics of the dataset the policy was trained on",
                )
            joined[prefix] = FeatureStats(*(np.concatenate([getattr(p, name) for p in parts]) for name in STATISTICS))
        fingerprint = digest_value({key: stats.to_json() for key, stats in self.stats.items()})
        return NormStats(joined[STATE], joined[ACTION], 0, "train", fingerprint)


@dataclass(frozen=True)
class ReleasedStatistics:
    """A checkpoint's statistics.json. state_mode: how actions are normalised (states are QUANTILE always)."""

    state_mode: Normalization
    datasets: dict[str, DatasetStatistics]

    def dataset(self, repo_id: str | None = None) -> DatasetStatistics:
        """Of one dataset, by default the first, which the release serves with. An unknown name: ConfigError."""
        return lookup(self.datasets, next(iter(self.datasets)) if repo_id is None else repo_id, "dataset")


class _Entry(BaseModel):
    features: dict[str, Any] = Field(min_length=1)
    stats: dict[str, Any] = Field(min_length=1)


class _ReleaseFile(BaseModel):
    state_mode: Normalization
    datasets: dict[str, _Entry] = Field(min_length=1)


def read_statistics(path: Path) -> ReleasedStatistics:
    """Read a statistics.json. Raises CheckpointError or DataError, which name the field at fault."""
    raw = read_json(path)
    if isinstance(raw, dict) and not raw.get("datasets"):  # one dataset without a name
        raw = raw | {"datasets": {"": {"features": raw.get("features"), "stats": raw.get("stats")}}}
    try:
        file = _ReleaseFile.model_validate(raw)
    except ValidationError as err:
        field, found, expected = faults(err)[0]
        raise CheckpointError(
            "A statistics file is malformed",
            file=path,
            field=field,
            found=found,
            expected=expected,
            cure="restore the file from the checkpoint's source, or compute it again with `prts stats`",
        ) from err
    datasets = {}
    for name, entry in file.datasets.items():
        stats = {key: value for key, value in entry.stats.items() if key.startswith((STATE, ACTION))}
        where = f"{path}: {f'datasets.{name}.' if name else ''}stats"
        parsed = {key: FeatureStats.from_json(value, f"{where}.{key}") for key, value in stats.items()}
        datasets[name] = DatasetStatistics(entry.features, parsed)
    return ReleasedStatistics(file.state_mode, datasets)


def write_statistics(path: Path, statistics: ReleasedStatistics) -> None:
    """Features keep their order: it is the order of the cameras in the prompt."""
    entries = {
        name: {"features": one.features, "stats": {key: stats.to_json() for key, stats in one.stats.items()}}
        for name, one in statistics.datasets.items()
    }
    record = {"state_mode": statistics.state_mode, **next(iter(entries.values())), "datasets": entries}
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_norm_stats(path: Path, stats: Mapping[str, FeatureStats]) -> None:
    write_json(path, {key: one.to_json() for key, one in stats.items()})
