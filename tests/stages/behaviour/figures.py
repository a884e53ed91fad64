"""Describe every file of a stage's output by what any machine makes of the same work.

`exact` is a digest of what must not differ at all: text, names, shapes, counts, whole files without a fraction in them.
`numbers` are figures of the rest, which a processor's last bits and a renderer's rounding may move: a few values
themselves, or of many their mean, root mean square and a weighted sum in which every place counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import yaml
from PIL import Image

from prts_core.data.lerobot_v21 import video
from prts_core.io.tensors import load_tensors

VALUES = 16  # up to so many values are kept themselves
FRACTION = re.compile(r"(?<![\w.])-?\d+\.\d+(?:e[+-]?\d+)?(?!\w)")
DIGEST = re.compile(r"[0-9a-f]{16,64}(?:…|\.\.\.)?")
Described = tuple[Any, dict[str, np.ndarray]]  # what must be equal, arrays of what must be close


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """path -> {"exact": digest, "numbers": {name: [number, ...]}} of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): describe(path) for path in paths}


def describe(path: Path) -> dict[str, Any]:
    exact, arrays = READERS.get(path.suffix, _bytes)(path)
    numbers = {name: summary(array) for name, array in sorted(arrays.items())}
    text = json.dumps([exact, {name: int(np.size(a)) for name, a in arrays.items()}], sort_keys=True, default=str)
    return {"exact": hashlib.sha256(text.encode()).hexdigest()[:16]} | ({"numbers": numbers} if numbers else {})


def summary(array: np.ndarray) -> list[float]:
    """A few values themselves; of many mean, root mean square and a sum weighted by place."""
    values = np.asarray(array, np.float64).ravel()
    if len(values) > VALUES:
        wave = np.sqrt(2) * np.cos(0.7 * np.arange(len(values)) + 0.3)
        values = np.array([values.mean(), np.sqrt(np.mean(values**2)), np.mean(values * wave)])
    return [float(f"{value:.7g}") for value in values]


# ---- one kind of file each -------------------------------------------------------------------------------------------
def _bytes(path: Path) -> Described:
    return hashlib.sha256(path.read_bytes()).hexdigest(), {}


def _tree(value: Any) -> Described:
    """Plain data: fractions are numbers, by the path of keys that leads to them. Left out: digests, sizes of files,
    and fractions inside a sentence."""
    found: dict[str, list[float]] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            inside = {key: inner for key, inner in value.items() if key != "size"}
            return {key: walk(inner, f"{name}.{key}" if name else str(key)) for key, inner in inside.items()}
        if isinstance(value, list):
            return [walk(inner, f"{name}[]") for inner in value]
        if isinstance(value, float):
            found.setdefault(name, []).append(value)
            return "fraction"
        return DIGEST.sub("digest", FRACTION.sub("fraction", value)) if isinstance(value, str) else value

    exact = walk(value, "")
    return exact, {name: np.array(values) for name, values in found.items()}


def _text(path: Path) -> Described:
    """Anything to be read: fractions are numbers in their order. Left out: digests, embedded files, and whether a
    policy's answers depend on their neighbours in a batch, which is the processor's."""
    text = re.sub(r"base64,[\w+/=]+|<div class=note>Rows may depend[^<]*</div>", "", path.read_text())
    numbers = np.array([float(number) for number in FRACTION.findall(text)])
    return DIGEST.sub("digest", FRACTION.sub("fraction", text)), {"text": numbers} if len(numbers) else {}


def _csv(path: Path) -> Described:
    return _columns(pl.read_csv(path))


def _parquet(path: Path) -> Described:
    return _columns(pl.read_parquet(path))


def _columns(frame: pl.DataFrame) -> Described:
    exact: dict[str, Any] = {"schema": {name: str(kind) for name, kind in frame.schema.items()}}
    arrays = {}
    for name, column in frame.to_dict().items():
        inner = column.explode() if isinstance(column.dtype, pl.List | pl.Array) else column
        if inner.dtype.is_float():
            exact[name] = column.list.len().to_list() if column.dtype == pl.List else len(column)
            arrays[name] = inner.fill_null(0.0).to_numpy()
        else:
            exact[name] = column.to_list()
    return exact, arrays


def _hdf5(path: Path) -> Described:
    """Arrays of all episodes together, by their name within one."""
    exact: dict[str, Any] = {}
    found: dict[str, list[np.ndarray]] = {}

    def visit(name: str, thing: h5py.Group | h5py.Dataset) -> None:
        exact[f"{name} attributes"] = {key: _plain(value) for key, value in thing.attrs.items()}
        if isinstance(thing, h5py.Dataset):
            exact[name] = [str(thing.dtype), list(thing.shape)]
            kind = " pixels" if thing.ndim > 2 else ""
            found.setdefault(re.sub(r"demo_\d+", "demo", name) + kind, []).append(np.ravel(thing[()]))

    with h5py.File(path) as file:
        file.visititems(visit)
    return exact, {name: np.concatenate(arrays) for name, arrays in found.items()}


def _plain(value: Any) -> str:
    return str(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def _weights(path: Path) -> Described:
    """Of every part of the network, its tensors one after the other."""
    tensors, about = load_tensors(path)
    parts: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors):
        parts.setdefault(".".join(name.split(".")[:3]), []).append(tensors[name].float().numpy().ravel())
    exact = [about, {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}]
    return exact, {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _picture(path: Path) -> Described:
    with Image.open(path) as picture:
        return [picture.size, picture.mode], {"pixels": np.asarray(picture.convert("RGB"))}


def _video(path: Path) -> Described:
    facts = video.probe(path)
    frames = video.decode(path, list(range(facts.frames)))
    return str(facts), {"pixels": frames, "bytes": np.array([path.stat().st_size])}


READERS: Mapping[str, Callable[[Path], Described]] = {
    ".json": lambda path: _tree(json.loads(path.read_text())),
    ".jsonl": lambda path: _tree([json.loads(line) for line in path.read_text().splitlines()]),
    ".yaml": lambda path: _tree(yaml.safe_load(path.read_text())),
    ".md": _text,
    ".html": _text,
    ".csv": _csv,
    ".parquet": _parquet,
    ".hdf5": _hdf5,
    ".safetensors": _weights,
    ".png": _picture,
    ".mp4": _video,
}


# ---- comparing -------------------------------------------------------------------------------------------------------
def differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], allowed: Callable[[str, str], float]
) -> Iterable[str]:
    """What differs, one sentence each. allowed: of (file, number) the relative tolerance; 0 for none."""
    for path in sorted(found.keys() | expected.keys()):
        if path not in expected or path not in found:
            yield f"{path}: {'new' if path in found else 'no longer there'}"
            continue
        ours, theirs = found[path], expected[path]
        if ours["exact"] != theirs["exact"]:
            yield f"{path}: text, names, shapes or counts: found {ours['exact']}, expected {theirs['exact']}"
            continue
        for name, values in ours.get("numbers", {}).items():
            wanted = theirs["numbers"][name]
            scale = max(1e-9, *map(abs, values), *map(abs, wanted))
            worst = max(abs(a - b) for a, b in zip(values, wanted, strict=True)) / scale
            if worst > allowed(path, name):
                yield f"{path}: {name}: found {_shown(values)}, expected {_shown(wanted)} ({worst:.2g} of it apart)"


def _shown(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
