"""Read the dataset YAML of the public PRTS release (`lerobot_datasets:`, `mm_datasets:`) as it is.

Nothing is dropped without a word: where a public field means something else here, that is said.

    repo_id                the dataset's name (`/` becomes `__`), and where to download it from if `root` is not given
    root, episodes         the LeRobot v2.1 folder, and which of its episodes
    state_mode             checked, not used: as in the release, the run decides (`train.normalization`)
    state_relative_action  true: the embodiment's relative dimensions are trained as a[t+h] - s[t]; default false
    embodiment_tag         configs/robots/<tag>.yaml
    train_subtask          prts_core.data.subtasks
    select_*_keys          cameras and columns that become views, state and action
    load_quantile_stats    checked, not used: stage stats always computes exact quantiles, and only QUANTILE reads them
    optional, revision     ours: its absence is no fault; which version of repo_id is downloaded
    weight                 the release reads it from no entry; here the share of the mixture
    mm_datasets            LLaVA-style files (prts_core.data.llava): name, json_path, sampling_strategy,
                           vision_base_path, weight
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prts_core.config.checked_yaml import check
from prts_core.config.checks import Strict
from prts_core.config.schema import DatasetConfig
from prts_core.config.sources import ImageTextSource
from prts_core.io.errors import ConfigError, lookup

_MODES = dict.fromkeys(("QUANTILE", "MEAN_STD", "MIN_MAX"))


@dataclass(frozen=True)
class _Robot(Strict):
    """One entry of `lerobot_datasets:`."""

    repo_id: str
    root: str | None = None
    episodes: tuple[int, ...] | None = None
    state_mode: str | None = None
    state_relative_action: bool = False
    embodiment_tag: str | None = None
    train_subtask: bool | str = False
    select_video_keys: tuple[str, ...] | None = None
    select_state_keys: tuple[str, ...] | None = None
    select_action_keys: tuple[str, ...] | None = None
    load_quantile_stats: bool = True
    optional: bool = False
    revision: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class _ImageText(Strict):
    """One entry of `mm_datasets:`."""

    name: str
    json_path: str
    sampling_strategy: str = "all"
    vision_base_path: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class PublicRelease:
    """What such a file brings. notes: fields that mean less here than a reader may think."""

    datasets: tuple[DatasetConfig, ...]
    image_text: dict[str, ImageTextSource] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_public_release(raw: dict[str, Any]) -> bool:
    return "lerobot_datasets" in raw or "mm_datasets" in raw


def read_public_release(raw: dict[str, Any], path: Path) -> PublicRelease:
    """Check every entry; ConfigError names file and entry. Notes are warned about once."""
    from prts_core.config.sampling import choose
    from prts_core.config.subtask_mode import SubtaskMode

    stray = sorted(set(raw) - {"lerobot_datasets", "mm_datasets"})
    if stray:
        raise ConfigError(
            "Unknown key beside the public release's lists",
            file=path,
            field=stray[0],
            expected="lerobot_datasets, mm_datasets",
        )
    datasets: dict[str, DatasetConfig] = {}
    image_text: dict[str, ImageTextSource] = {}
    notes = []
    for where, raw_entry in _entries(raw, "lerobot_datasets", path):
        entry = check(_Robot, raw_entry, where)
        SubtaskMode.parse(entry.train_subtask, where)
        if entry.state_relative_action and entry.embodiment_tag is None:
            raise ConfigError(
                "State-relative actions need an embodiment_tag: it says which dimensions are relative",
                file=where,
                field="embodiment_tag",
                cure="name a file of configs/robots/",
            )
        if entry.state_mode is not None:
            lookup(_MODES, entry.state_mode, "state_mode")
            notes.append(f"{where}: state_mode {entry.state_mode} is not used: train.normalization of the recipe is")
        if not entry.load_quantile_stats:
            notes.append(f"{where}: load_quantile_stats false changes nothing: quantiles are computed in any case")
        name = entry.repo_id.replace("/", "__")
        _new(name, datasets, where, "repo_id")
        source = {
            "kind": "lerobot",
            "root": entry.root,
            "repo_id": entry.repo_id,
            "revision": entry.revision,
            "episodes": entry.episodes,
            "select_video": entry.select_video_keys,
            "select_state": entry.select_state_keys,
            "select_action": entry.select_action_keys,
        }
        datasets[name] = check(
            DatasetConfig,
            {
                "name": name,
                "source": source,
                "embodiment_tag": entry.embodiment_tag,
                "train_subtask": entry.train_subtask,
                "weight": entry.weight,
                "optional": entry.optional,
                "state_relative": entry.state_relative_action,
            },
            where,
        )
    for where, raw_entry in _entries(raw, "mm_datasets", path):
        item = check(_ImageText, raw_entry, where)
        choose(1, item.sampling_strategy, 0)
        _new(item.name, image_text, where, "name")
        image_text[item.name] = ImageTextSource(
            item.json_path, item.vision_base_path, item.sampling_strategy, item.weight
        )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return PublicRelease(tuple(datasets.values()), image_text, tuple(notes))


def _entries(raw: dict[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    entries = raw.get(key) or []
    if not isinstance(entries, list):
        raise ConfigError("A list is expected", file=path, field=key, found=type(entries).__name__)
    return [(f"{path}: {key}[{index}]", entry) for index, entry in enumerate(entries)]


def _new(name: str, known: dict[str, Any], where: str, what: str) -> None:
    if name in known:
        raise ConfigError("Two entries have one name", file=where, field=what, found=name)
