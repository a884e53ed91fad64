"""ALOHA recordings: one HDF5 file an episode with /observations/{qpos, qvel, effort, images/<camera>} and /action.

Keys are paths in the file. Pictures are raw (T, H, W, 3) or compressed, one JPEG a row, padded to one length (attribute
`compress`) or of its own length; those come as the JPEG says, in RGB. OpenCV, which ALOHA compresses with, takes its
input for BGR: files that were fed RGB need `channels: bgr` in the mapping.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prts_core.config.checks import Strict
from prts_core.config.mapping import Mapping
from prts_core.data.convert.hdf5 import (
    Shapes,
    arrays_of,
    decode_image,
    member,
    name_below,
    opened,
    path_of,
    read_all,
    require_train,
    split_files,
)
from prts_core.data.convert.source import Field, RawEpisode, Recording
from prts_core.io.errors import DataError

_LAYOUT = "ALOHA"
_PICTURES = "observations/images/"
_TASK_ATTRIBUTES = ("language_instruction", "task", "instruction")


@dataclass(frozen=True)
class Options(Strict):
    """An ALOHA recording asks for nothing of its own."""


class Source:
    """See prts_core.data.convert.source.Source."""

    def __init__(self, path: Path, mapping: Mapping) -> None:
        self.path, self.mapping = path, mapping
        mapping.options_as(Options)

    def scan(self) -> Recording:
        shapes = Shapes(self.mapping.keys)
        episodes = []
        for split, path in split_files(self.path):
            name = name_below(path, self.path)
            with opened(path) as file:
                member(file, "action", path, _LAYOUT)
                member(member(file, "observations", path, _LAYOUT), "qpos", path, _LAYOUT)
                arrays = {key: array for key, array in arrays_of(file).items() if array.ndim and len(array)}
                fields = {key: _field(key, array, path) for key, array in arrays.items()}
                lengths = {key: len(array) for key, array in arrays.items()}
                if "action" not in lengths:
                    raise DataError("An episode is empty", file=path, field="/action", found="0 rows")
                extra: dict[str, Any] = {"source": {"file": name}}
                if "sim" in file.attrs:
                    extra["sim"] = bool(file.attrs["sim"])
                episodes.append(
                    RawEpisode(
                        key=name,
                        length=shapes.add(fields, lengths, path, "", "action"),
                        task=self.mapping.task or _task(file),
                        split=split,
                        extra=extra,
                        files=(name,) if self.path.is_dir() else (),
                        where=name,
                    )
                )
        require_train([episode.split for episode in episodes], self.path)
        return Recording(tuple(episodes), shapes.fields, robot_type="aloha")

    def read(self, episode: RawEpisode, keys: Collection[str]) -> dict[str, np.ndarray]:
        path = path_of(episode.where, self.path)
        with opened(path) as file:
            return {key: _array(key, file[key], path) for key in keys}


def _compressed(key: str, array: Any) -> bool:
    """Pictures as byte strings: (T, bytes) padded, or (T,) of bytes of their own length."""
    own_length = h5py.check_vlen_dtype(array.dtype) == np.dtype(np.uint8) and array.ndim == 1
    return own_length or (key.startswith(_PICTURES) and array.dtype == np.uint8 and array.ndim == 2)


def _field(key: str, array: Any, path: Path) -> Field:
    if _compressed(key, array):
        return Field("uint8", decode_image(array[0], path, f"/{key}, row 0").shape)
    return Field(str(array.dtype), array.shape[1:])


def _array(key: str, array: Any, path: Path) -> np.ndarray:
    if not _compressed(key, array):
        return read_all(array, path, f"/{key}")
    rows = read_all(array, path, f"/{key}")
    first = decode_image(rows[0], path, f"/{key}, row 0")
    out = np.empty((len(rows), *first.shape), np.uint8)
    for number, row in enumerate(rows):
        picture = decode_image(row, path, f"/{key}, row {number}")
        if picture.shape != first.shape:
            raise DataError(
                "Pictures of one camera differ in size",
                file=path,
                field=f"/{key}, row {number}",
                found=str(picture.shape),
                expected=str(first.shape),
            )
        out[number] = picture
    return out


def _task(file: Any) -> str:
    for name in _TASK_ATTRIBUTES:
        value = file.attrs.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return ""
