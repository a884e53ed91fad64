"""Read ALOHA recordings: one HDF5 file an episode with /observations/{qpos, qvel, effort, images/<camera>} and /action.

Keys are paths in the file. Pictures are raw (T, H, W, 3) or compressed, one JPEG a row, padded to one length (attribute
`compress`) or of its own length; those come as the JPEG says, in RGB. OpenCV, which ALOHA compresses with, takes its
input for BGR: files that were fed RGB need `channels: bgr` in the mapping.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prts_core.data.convert.hdf5 import Hdf5Source, Shapes, arrays_of, decode_image, member, opened, read_all
from prts_core.data.convert.source import Field, RawEpisode, Recording
from prts_core.io.errors import DataError

_LAYOUT = "ALOHA"
_PICTURES = "observations/images/"
_TASK_ATTRIBUTES = ("language_instruction", "task", "instruction")


class Source(Hdf5Source):
    """See prts_core.data.convert.source.Source."""

    def scan(self) -> Recording:
        return replace(super().scan(), robot_type="aloha")

    def episodes(self, file: h5py.File, path: Path, split: str, shapes: Shapes) -> Iterator[RawEpisode]:
        member(file, "action", path, _LAYOUT)
        member(member(file, "observations", path, _LAYOUT), "qpos", path, _LAYOUT)
        arrays = {key: array for key, array in arrays_of(file).items() if array.ndim and len(array)}
        fields = {key: _field(key, array, path) for key, array in arrays.items()}
        if "action" not in arrays:
            raise DataError("An episode is empty", file=path, field="/action", found="0 rows")
        name = self.name(path)
        simulated = {"sim": bool(file.attrs["sim"])} if "sim" in file.attrs else {}
        yield RawEpisode(
            key=name,
            length=shapes.add(fields, {key: len(array) for key, array in arrays.items()}, path, "", "action"),
            task=self.mapping.task or _task(file),
            split=split,
            extra={"source": {"file": name}} | simulated,
            files=self.files(name),
            where=name,
        )

    def read(self, episode: RawEpisode, keys: Collection[str]) -> dict[str, np.ndarray]:
        path = self.file(episode.where)
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
    rows = read_all(array, path, f"/{key}")
    if not _compressed(key, array):
        return rows
    out: np.ndarray | None = None
    for number, row in enumerate(rows):
        picture = decode_image(row, path, f"/{key}, row {number}")
        out = np.empty((len(rows), *picture.shape), np.uint8) if out is None else out
        if picture.shape != out.shape[1:]:
            problem, expected = "Pictures of one camera differ in size", str(out.shape[1:])
            where = f"/{key}, row {number}"
            raise DataError(problem, file=path, field=where, found=str(picture.shape), expected=expected)
        out[number] = picture
    assert out is not None, "episodes have rows"
    return out


def _task(file: Any) -> str:
    values = (file.attrs.get(name) for name in _TASK_ATTRIBUTES)
    return next((value for value in values if isinstance(value, str) and value.strip()), "")
