"""Read the features.json of a tensorflow_datasets folder: which features a step has, and how each lies in a record.

Only what can be read without TensorFlow is described; other kinds are named with the reason, so that a mapping that
asks for them is told why.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prts_core.data.convert.source import Field
from prts_core.data.images import opened_picture
from prts_core.io.errors import DataError
from prts_core.io.files import read_json

STEPS, EPISODE = "steps", "episode_metadata"
_CURE = "prepare the dataset again with tensorflow_datasets"
_PLAIN = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
Kind = Literal["number", "image", "text", "bytes", "zlib"]


@dataclass(frozen=True)
class Leaf:
    """One feature of a step (or of an episode). shape: -1 for a side that the file does not say.

    kind: number (a list of numbers), image (PNG or JPEG), text (UTF-8), bytes or zlib (raw little-endian numbers).
    """

    kind: Kind
    dtype: str
    shape: tuple[int, ...]

    @property
    def field(self) -> Field:
        """As a mapping sees it; pictures of one channel are (H, W)."""
        gray = self.kind == "image" and self.shape[-1:] == (1,)
        return Field(self.dtype, self.shape[:-1] if gray else self.shape)


def read_features(root: Path) -> tuple[dict[str, Leaf], dict[str, Leaf], dict[str, str]]:
    """(features of a step, features of an episode, unread features with the reason); keys are paths with slashes."""
    path = root / "features.json"
    top = _children(read_json(path), path, "")
    if STEPS not in top:
        raise DataError(
            "A dataset has no steps, so it is not RLDS",
            file=path,
            found=", ".join(top),
            expected=f"a feature {STEPS!r}",
        )
    inner = top[STEPS].get("sequence", {}).get("feature")
    if not isinstance(inner, dict):
        raise DataError("The steps of a dataset are not described", file=path, field=f"{STEPS}.sequence.feature")
    unread: dict[str, str] = {}
    steps = _leaves(inner, path, "", unread)
    episode: dict[str, Leaf] = {}
    for name, node in top.items():
        if name != STEPS:
            episode |= _leaves(node, path, name, unread)
    return steps, episode, unread


def _children(node: Any, path: Path, where: str) -> dict[str, Any]:
    features = node.get("featuresDict", {}).get("features") if isinstance(node, dict) else None
    if not isinstance(features, dict) or not all(isinstance(value, dict) for value in features.values()):
        raise DataError("Features are not described", file=path, field=where or "featuresDict.features", cure=_CURE)
    return features


def _leaves(node: dict[str, Any], path: Path, where: str, unread: dict[str, str]) -> dict[str, Leaf]:
    if "featuresDict" in node:
        leaves: dict[str, Leaf] = {}
        for name, child in _children(node, path, where).items():
            leaves |= _leaves(child, path, f"{where}/{name}" if where else name, unread)
        return leaves
    if "text" in node:
        return {where: Leaf("text", "string", ())}
    if "classLabel" in node:
        return {where: Leaf("number", "int64", ())}  # the label's number; its name stands in a file of labels
    if "boundingBox" in node:
        return {where: Leaf("number", "float32", (4,))}
    for kind in ("tensor", "image"):
        if kind in node:
            leaf = _leaf(kind, node[kind], path, where)
            if isinstance(leaf, Leaf):
                return {where: leaf}
            unread[where] = leaf
            return {}
    unread[where] = str(node.get("pythonClassName", "of an unknown class")).rpartition(".")[2]
    return {}


def _leaf(kind: str, node: Any, path: Path, where: str) -> Leaf | str:
    """The leaf, or why it is not read."""
    try:
        dtype = str(node.get("dtype", "uint8"))
        shape = tuple(int(side) for side in (node.get("shape") or {}).get("dimensions", ()))
    except (AttributeError, TypeError, ValueError) as err:
        raise DataError("A feature's shape is not described", file=path, field=where, found=str(node)[:120]) from err
    encoding = str(node.get("encoding", "none"))
    if kind == "image":
        if len(shape) != 3 or dtype not in ("uint8", "uint16"):
            return f"a picture {dtype}{list(shape)}"
        return Leaf("image", dtype, shape)
    if dtype == "string":
        return Leaf("text", dtype, shape) if shape == () else "a list of texts"
    if dtype not in _PLAIN or encoding not in ("none", "bytes", "zlib") or any(side < 1 for side in shape):
        return f"{dtype}{list(shape)}, encoding {encoding}"
    return Leaf("number" if encoding == "none" else "bytes" if encoding == "bytes" else "zlib", dtype, shape)


def rows_of(leaf: Leaf, values: Any) -> int | None:
    """Steps that a list of values stands for; None where it is no whole number of them."""
    if leaf.kind != "number":
        return len(values)
    width = int(np.prod(leaf.shape, dtype=np.int64))
    return len(values) // width if len(values) % width == 0 else None


def decode_rows(leaf: Leaf, values: Any, size: tuple[int, ...], where: tuple[Path, str]) -> np.ndarray:
    """Values of one feature as (T, *size) in its own dtype; pictures are decoded, as RGB where they have colours.

    size: the field's shape, as the scan found it. where: file and field, for errors.
    """
    path, field = where
    if leaf.kind == "number":
        return np.asarray(values).reshape(-1, *leaf.shape).astype(leaf.dtype)
    if leaf.kind == "image":
        out = np.empty((len(values), *size), leaf.dtype)
        for row, data in enumerate(values):
            out[row] = picture(data, size, leaf.dtype, path, f"{field}, row {row}")
        return out
    rows = []
    for row, data in enumerate(values):
        try:
            raw = zlib.decompress(data) if leaf.kind == "zlib" else data
            rows.append(np.frombuffer(raw, np.dtype(leaf.dtype).newbyteorder("<")).reshape(leaf.shape))
        except (zlib.error, ValueError) as err:
            raise DataError(
                "A feature's bytes are not what features.json says",
                file=path,
                field=f"{field}, row {row}",
                found=str(err)[:120],
                expected=f"{leaf.dtype}{list(leaf.shape)}, {leaf.kind}",
            ) from err
    return np.stack(rows).astype(leaf.dtype)


def picture(data: bytes, size: tuple[int, ...] | None, dtype: str, path: Path, where: str) -> np.ndarray:
    """One PNG or JPEG as (H, W, 3) uint8 RGB, or (H, W) where it has one channel. size: what it must be, if known.

    The size is read from the header and compared before anything is decoded.
    """
    problem = "A picture cannot be decoded"
    with opened_picture(data, problem, ("PNG", "JPEG"), file=path, field=where, expected="PNG or JPEG") as image:
        if size is not None and (image.height, image.width) != size[:2]:
            found, expected = f"{image.height}x{image.width}", f"{size[0]}x{size[1]}"
            problem = "Pictures of a recording differ in size"
            raise DataError(problem, file=path, field=where, found=found, expected=expected)
        deep = image.mode.startswith("I") or image.mode == "L"
        return np.asarray(image if deep else image.convert("RGB")).astype(dtype)
