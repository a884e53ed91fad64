"""Read HDF5 for every source that lies in it: open files, list a group's arrays, read some of them, compare episodes.

Links to other files and objects that would need unpickling are not followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prts_core.data.convert.source import Field, RawEpisode, Recording, Source
from prts_core.data.images import opened_picture
from prts_core.io.errors import DataError

SUFFIXES = (".hdf5", ".h5")
SPLITS = ("train", "heldout")


def find_files(root: Path) -> list[Path]:
    """The HDF5 files of a folder (not below it), or the file itself, in name order with numbers counted."""
    if root.is_file():
        return [root]
    return sorted((p for p in root.glob("*") if p.suffix in SUFFIXES and not p.name.startswith(".")), key=natural)


def natural(path: Path) -> list[tuple[int, int | str]]:
    """episode_2 before episode_10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name + "\0") if part]


def split_files(root: Path) -> list[tuple[str, Path]]:
    """(split, file): of <root>/train and <root>/heldout where there are such folders, else all in <root> for train."""
    folders = [(split, root / split) for split in SPLITS if any((root / name).is_dir() for name in SPLITS)]
    return [(split, path) for split, folder in folders or [("train", root)] for path in find_files(folder)]


def require_train(splits: Collection[str], root: Path) -> None:
    if "train" not in splits:
        raise DataError(
            "There are no training recordings to convert",
            file=root / "train" if (root / "heldout").is_dir() else root,
            found=f"{len(splits)} episodes" if splits else "none",
            expected=f"files ending in {', '.join(SUFFIXES)} with episodes",
            cure="run `prts collect` first, or name the folder that holds the recordings",
        )


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except OSError as err:
        raise DataError(
            "A recording cannot be read: it is truncated or damaged",
            file=path,
            found=" ".join(str(err).split())[:200],
            expected="a whole HDF5 file",
            cure="delete it and record it again (`prts collect` records only what is missing)",
        ) from err
    with file:
        yield file


def member(group: Any, name: str, path: Path, layout: str) -> Any:
    if name not in group:
        raise DataError(
            f"A recording lacks a part of the {layout} layout",
            file=path,
            field=f"{group.name.rstrip('/')}/{name}",
            found=", ".join(group) or "nothing",
            cure="record it again, or choose the --source that this file is",
        )
    return group[name]


def json_attribute(group: Any, name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(group.attrs[name])
    except (KeyError, ValueError, TypeError) as err:
        raise DataError(
            "A recording lacks an attribute, or it is not JSON", file=path, field=f"{group.name}.{name}", found=str(err)
        ) from err
    if not isinstance(value, dict):
        raise DataError(
            "An attribute is not a JSON object", file=path, field=f"{group.name}.{name}", found=str(value)[:80]
        )
    return value


def arrays_of(group: Any, prefix: str = "") -> dict[str, Any]:
    """Every dataset below `group` by its path; soft and external links are left alone."""
    out: dict[str, Any] = {}
    for name in sorted(group):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        node = group[name]
        if isinstance(node, h5py.Group):
            out |= arrays_of(node, f"{prefix}{name}/")
        elif isinstance(node, h5py.Dataset):
            out[prefix + name] = node
    return out


class Shapes:
    """Fields of all episodes so far; an episode whose mapped keys differ from the first's is refused.

    keys: those that the mapping reads. Others are listed for the reader of an error, and may differ.
    """

    def __init__(self, keys: Collection[str]) -> None:
        self.keys, self.fields = keys, {}  # type: Collection[str], dict[str, Field]
        self.first = ""

    def add(self, found: dict[str, Field], lengths: dict[str, int], path: Path, where: str, rows_of: str) -> int:
        """Check one episode and return its rows, those of the key `rows_of`."""
        length = lengths[rows_of]
        cure = "record all episodes with one robot and one camera set, or convert them apart"
        if length < 1:
            raise DataError("An episode is empty", file=path, field=where, found="0 rows", expected="at least 1")
        for key in sorted(self.keys):
            wrong = partial(DataError, file=path, field=f"{where}/{key}")
            spec, known = found.get(key), self.fields.get(key) if self.first else found.get(key)
            if spec is None and known is not None:
                shown, expected = ", ".join(sorted(found)), f"{key}, as in {self.first}"
                raise wrong("An episode lacks a key that others have", found=shown, expected=expected, cure=cure)
            if spec is not None and lengths[key] != length:
                shown, expected = f"{lengths[key]} rows", f"{length} rows, as {rows_of} has"
                raise wrong("Arrays of an episode differ in length", found=shown, expected=expected)
            if spec is not None and known is not None and spec != known:
                shape = spec.shape != known.shape
                shown, expected = (str(one.shape if shape else one) for one in (spec, known))
                expected += f", as in {self.first}"
                raise wrong("Episodes differ in width", found=shown, expected=expected, cure=cure)
        if not self.first:
            self.fields, self.first = dict(found), f"{path.name}:{where}"
        return length


def read_all(dataset: Any, path: Path, where: str) -> np.ndarray:
    try:
        return dataset[:]
    except OSError as err:
        raise DataError(
            "An array cannot be read: the recording is damaged",
            file=path,
            field=where,
            found=" ".join(str(err).split())[:200],
            cure="delete it and record it again",
        ) from err


def decode_image(data: np.ndarray | bytes, path: Path, where: str) -> np.ndarray:
    """One JPEG or PNG as (H, W, 3) uint8 RGB; zero bytes that pad it to a fixed length do no harm."""
    raw = data if isinstance(data, bytes) else np.asarray(data, np.uint8).tobytes()
    problem, cure = "A compressed picture cannot be decoded", "record the episode again, or leave it out"
    with opened_picture(
        raw, problem, ("JPEG", "PNG"), file=path, field=where, expected="JPEG or PNG", cure=cure
    ) as image:
        return np.asarray(image.convert("RGB"))


class Hdf5Source(Source):
    """Episodes of all HDF5 files; a subclass says which there are in one."""

    def scan(self) -> Recording:
        shapes = Shapes(self.mapping.keys)
        episodes: list[RawEpisode] = []
        for split, path in split_files(self.path):
            with opened(path) as file:
                episodes += self.episodes(file, path, split, shapes)
        require_train([episode.split for episode in episodes], self.path)
        return Recording(tuple(episodes), shapes.fields)

    def episodes(self, file: h5py.File, path: Path, split: str, shapes: Shapes) -> Iterator[RawEpisode]:
        """Those of one open file, in order, each held against `shapes`."""
        raise NotImplementedError
