"""Define what every converter implements: what a recording holds, and one episode of it at a time.

A source hands out its own keys and arrays as they were recorded; the mapping says what they mean, `run` applies it and
writes.

To add a source: a module of this room with a class `Source` below, one line in SOURCES, a mapping in configs/mappings/,
tests beside tests/data/test_convert_robomimic.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.checks import Strict
from prts_core.config.mapping import Mapping
from prts_core.io.errors import DataError, lookup, suggest

# Name at the command line and in a mapping's `source` -> module with a class `Source`.
SOURCES: dict[str, str] = {
    "robomimic": "prts_core.data.convert.robomimic",
    "aloha": "prts_core.data.convert.aloha",
    "rollouts": "prts_core.data.convert.rollouts",
    "rlds": "prts_core.data.convert.rlds",
    "mcap": "prts_core.data.convert.mcap",
}
# Formats of whole datasets, which say themselves what their numbers mean and need no mapping: name -> module with
# `import_dataset(root, output, work, *, dataset, robot, workers) -> Contract` (root, output, work: Path; robot:
# RobotConfig or none). It writes `output`, keeps what it has finished in `work`, and never changes `root`.
DATASETS: dict[str, str] = {
    "lerobot_v21": "prts_core.data.convert.lerobot_v21",
    "lerobot_v30": "prts_core.data.convert.lerobot_v30",
}


@dataclass(frozen=True)
class Field:
    """One key of a recording. shape: of one row, () for scalars; images are uint8 (H, W, 3), depth (H, W)."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(side) for side in self.shape)}]"


@dataclass(frozen=True)
class RawEpisode:
    """One episode without its arrays.

    key: stable identity inside the recording ("file:group"), by which a cut conversion knows what it has finished.
    length: rows. task: the instruction, "" where the source has none (the mapping then gives one). split: "train" or
    another name. extra: further fields of its line in episodes.jsonl (source, seed, success_row, action_config, ...).
    files: paths below the recording's root that the episode is read from; a changed file is converted again.
    where: whatever `read` needs to find it (plain data, no open handles).
    """

    key: str
    length: int
    task: str
    split: str = "train"
    extra: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    where: Any = None


@dataclass(frozen=True)
class Recording:
    """Everything found: episodes in their final order within a split (splits: train first, then as they appear).

    fields: key -> Field, equal in every episode (a source refuses episodes that disagree). fps: rows a second, where
    the recording itself says so. robot_type: likewise.
    """

    episodes: tuple[RawEpisode, ...]
    fields: dict[str, Field]
    fps: float | None = None
    robot_type: str | None = None


@dataclass(frozen=True)
class NoOptions(Strict):
    """Of a source that asks for nothing of its own."""


class Source:
    """One kind of recording. `read` is called from several threads at once, so files are opened per call and closed
    before it returns. options_type: what a mapping's `options` may hold."""

    options_type: type = NoOptions

    def __init__(self, path: Path, mapping: Mapping) -> None:
        self.path, self.mapping = path, mapping
        self.options: Any = mapping.options_as(self.options_type)

    def scan(self) -> Recording:
        """What is there, without arrays. Raises DataError for a damaged file or episodes that disagree."""
        raise NotImplementedError

    def read(self, episode: RawEpisode, keys: Collection[str]) -> dict[str, np.ndarray]:
        """Arrays (T, *fields[key].shape) of `keys`, all rows of one episode: the most a worker holds in memory.

        Compressed images come decoded, as RGB. Raises DataError for what cannot be read.
        """
        raise NotImplementedError

    def name(self, path: Path) -> str:
        """A file's name in keys and messages: its path below the recording's root."""
        return path.relative_to(self.path).as_posix() if self.path.is_dir() else path.name

    def file(self, name: str) -> Path:
        """The file of that name."""
        return self.path / name if self.path.is_dir() else self.path

    def files(self, *names: str) -> tuple[str, ...]:
        """`RawEpisode.files` of these names: none where the recording is one file."""
        return names if self.path.is_dir() else ()


def source_class(name: str) -> type[Source]:
    """The class `Source` of a registered module, or a ConfigError that lists the names."""
    return importlib.import_module(lookup(SOURCES, name, "source")).Source


def refuse_unknown(key: str, fields: dict[str, Field], file: object, what: str) -> None:
    """A DataError that lists what the recording holds, where a mapping names a key that it does not."""
    if key not in fields:
        shown = ", ".join(f"{name} {spec}" for name, spec in sorted(fields.items()))
        raise DataError(
            f"A mapping names a key that the recording does not have{suggest(key, fields)}",
            file=file,
            field=what,
            found=shown or "no keys",
            expected=key,
            cure="correct the key in the mapping, or remove the entry",
        )
