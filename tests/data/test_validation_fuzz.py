"""Random corruption: validation never crashes, and never passes a dataset that would load as something else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import read_table
from prts_core.data.lerobot_v21.seal import SEAL
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import PrtsError
from tests.data.conftest import Converted, convert_toy, write_raw

Rng = np.random.Generator
QUICK, PARTS = 18, 5
WHOLE = {True: 1000, False: 300}  # corruptions of the sealed dataset and of the unsealed one


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("fuzz")
    return convert_toy(folder, write_raw(folder / "raw", {"wave": "wave", "nod": "nod"}, train=1, rows=8, size=16))


def content(root: Path) -> str:
    """Digest of everything that loading gives; the words of the error where it refuses."""
    try:
        data = LeRobotDataset.open(root)
        digest = hashlib.sha256(repr((data.info, data.rows, data.tasks, data.contract)).encode())
        digest.update(repr(sorted(read_table(root, "episodes_stats"), key=lambda row: row.episode_index)).encode())
        for episode in data.episodes():
            for key, feature in data.info.features.items():
                values = data.frames(episode, key) if feature.is_video else data.columns(episode, [key])[key]
                digest.update(f"{episode} {key} {values.dtype} {values.shape}".encode() + values.tobytes())
    except PrtsError as err:
        return f"refused: {err}"
    return digest.hexdigest()


# ---- corruptions: each changes the folder and says what it did -------------------------------------------------------
def some(root: Path, rng: Rng, pattern: str = "**/*") -> Path:
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    return files[int(rng.integers(len(files)))]


def flip(root: Path, rng: Rng) -> str:
    path = some(root, rng)
    data = bytearray(path.read_bytes())
    places = rng.integers(0, len(data), int(rng.integers(1, 5)))
    for place in places:
        data[place] ^= int(rng.integers(1, 256))
    path.write_bytes(bytes(data))
    return f"flipped {path.relative_to(root)} at {places.tolist()}"


def truncate(root: Path, rng: Rng) -> str:
    path = some(root, rng)
    length = int(rng.integers(path.stat().st_size))
    path.write_bytes(path.read_bytes()[:length])
    return f"cut {path.relative_to(root)} to {length}"


def drop(root: Path, rng: Rng) -> str:
    path = some(root, rng)
    path.unlink()
    return f"dropped {path.relative_to(root)}"


def rename(root: Path, rng: Rng) -> str:
    path = some(root, rng)
    path.rename(path.with_name(f"x{path.name}"))
    return f"renamed {path.relative_to(root)}"


def shuffle(root: Path, rng: Rng) -> str:
    if rng.integers(4) == 0:
        path = some(root, rng, "meta/e*.jsonl")
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[int(i)] for i in np.roll(np.arange(len(lines)), 1)))
    else:
        path = some(root, rng, "data/**/*.parquet")
        table = pq.read_table(path)
        pq.write_table(table.take(pa.array(np.roll(rng.permutation(len(table)), 1))), path)
    return f"shuffled {path.relative_to(root)}"


def retype(root: Path, rng: Rng) -> str:
    path = some(root, rng, "data/**/*.parquet")
    table = pq.read_table(path)
    place = int(rng.integers(table.num_columns))
    kind, column = table.schema.field(place).type, table.column(place)
    if pa.types.is_fixed_size_list(kind):
        to: pa.DataType = pa.list_(pa.float64()) if rng.integers(2) else pa.list_(pa.string())
    else:
        choices = [pa.float64(), pa.string(), pa.int16(), pa.bool_()]
        to = choices[int(rng.integers(len(choices)))]
    if pa.types.is_integer(to) or pa.types.is_boolean(to):
        column = pc.cast(column, pa.int64(), safe=False)
    cast = pa.array(column.to_pylist()).cast(to) if pa.types.is_nested(kind) else pc.cast(column, to, safe=False)
    pq.write_table(table.set_column(place, table.column_names[place], cast), path)
    return f"{path.relative_to(root)}: {table.column_names[place]} as {to}"


def duplicate(root: Path, rng: Rng) -> str:
    path = some(root, rng)
    target = path.with_name(f"copy_{path.name}") if rng.integers(2) else some(root, rng, f"**/*{path.suffix}")
    if target != path:
        shutil.copy(path, target)
    return f"copied {path.relative_to(root)} to {target.relative_to(root)}"


def count(root: Path, rng: Rng) -> str:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    key = ["total_episodes", "total_frames", "total_tasks", "total_videos", "total_chunks"][int(rng.integers(5))]
    path.write_text(json.dumps(info | {key: int(info[key] + rng.integers(1, 9))}))
    return f"{key} changed"


def document(root: Path, rng: Rng) -> str:
    """Another value for one key of a JSON file, of any type."""
    path = some(root, rng, "meta/*.json*")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    raw = lines[int(rng.integers(len(lines)))] if lines else json.loads(path.read_text())
    node, way = raw, []
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[int(rng.integers(len(keys)))]
        way.append(key)
        child = node[key]
        if not isinstance(child, dict | list) or not child or rng.integers(3) == 0:
            wrong = [None, -1, 10**30, 1e308, float("nan"), "", "\0", "../..", "{}", "{a", [], {}, True, [[1], 2]]
            node[key] = wrong[int(rng.integers(len(wrong)))]
            break
        node = child
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) if lines else json.dumps(raw))
    return f"{path.relative_to(root)}: {way}"


Corruption = Callable[[Path, Rng], str]
ANY: list[Corruption] = [flip, truncate, drop, rename, shuffle, retype, duplicate, count, document]
STRUCTURAL: list[Corruption] = [truncate, drop, rename, shuffle, retype, count]


def attack(small: Converted, folder: Path, corruptions: list[Corruption], seeds: range, sealed: bool) -> None:
    root = Path(shutil.copytree(small.root, folder / "data"))
    if not sealed:
        (root / SEAL).unlink()
    sound = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    meant = content(root)
    assert validate_dataset(root).ok
    for seed in seeds:
        rng = np.random.default_rng(seed)
        did = corruptions[seed % len(corruptions)](root, rng)
        try:
            passed = validate_dataset(root).ok
        except PrtsError:
            passed = False
        if passed:
            assert content(root) == meant, f"seed {seed} passed: {did}"
        else:
            content(root)  # loading may refuse, not crash
        for path in root.rglob("*"):
            if path.is_file() and path not in sound:
                path.unlink()
        for path, data in sound.items():
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_a_few_corruptions(small: Converted, tmp_path: Path, sealed: bool) -> None:
    attack(small, tmp_path, ANY if sealed else STRUCTURAL, range(10_000, 10_000 + QUICK), sealed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_a_thousand_corruptions(small: Converted, tmp_path: Path, sealed: bool, part: int) -> None:
    step = WHOLE[sealed] // PARTS
    attack(small, tmp_path, ANY if sealed else STRUCTURAL, range(part * step, part * step + step), sealed)
