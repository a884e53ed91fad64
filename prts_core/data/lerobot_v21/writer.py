"""Write LeRobot v2.1 datasets as lerobot 0.3.3 writes them, one episode at a time.

Any number of workers may write episodes; `finish` then writes the metadata from the records that they return.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from prts_core.config.schema import VideoConfig
from prts_core.contract import Contract
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.schema import (
    CHUNKS_SIZE,
    CODEBASE_VERSION,
    DATA_PATH,
    STANDARD_FEATURES,
    VIDEO_PATH,
    data_file,
    totals,
    video_file,
)
from prts_core.data.lerobot_v21.seal import SEAL, seal
from prts_core.data.lerobot_v21.tables import write_parquet
from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path, digest_file, explain_os_errors, write_jsonl, write_text

Link = Literal["copy", "hardlink", "symlink"]  # how a file of another dataset is taken over


@dataclass(frozen=True)
class Layout:
    """Where and how a dataset is written. root: the dataset's folder. features: info.json's without the standard ones,
    in order."""

    root: Path
    features: dict[str, dict[str, Any]]
    fps: float
    robot_type: str
    video: VideoConfig = field(default_factory=VideoConfig)

    @property
    def all_features(self) -> dict[str, dict[str, Any]]:
        return self.features | STANDARD_FEATURES

    @property
    def cameras(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] == "video"]

    def files(self, episode: int) -> list[str]:
        """Paths below the root of an episode's table and of its videos, one a camera."""
        return [data_file(episode), *(video_file(episode, camera) for camera in self.cameras)]


@dataclass(frozen=True)
class EpisodeToWrite:
    """One episode in memory. key: names its source in errors.

    start: rows of all episodes before it. columns: (T, D) or (T,) arrays of every non-standard, non-camera feature.
    images: camera key -> (T, H, W, 3) uint8, depth camera key -> (T, H, W) uint16. extra: further fields of its line
    in episodes.jsonl.
    """

    index: int
    start: int
    key: str
    task: str
    task_index: int
    columns: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(next(iter(self.columns.values())))


def video_feature(height: int, width: int, fps: float, config: VideoConfig) -> dict[str, Any]:
    """A camera's entry of info.json."""
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": video.CODEC_NAMES[config.codec],
            "video.pix_fmt": config.pixel_format,
            "video.is_depth_map": False,
            "video.fps": plain_fps(fps),
            "video.channels": 3,
            "has_audio": False,
        },
    }


def image_feature(height: int, width: int) -> dict[str, Any]:
    """A camera's entry of info.json whose pictures lie in the table as PNG, without loss."""
    return {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}


def depth_feature(height: int, width: int, unit: str) -> dict[str, Any]:
    """A depth camera's entry of info.json: 16-bit greyscale PNG in the table. unit: of one step; 0: no measurement."""
    return {
        "dtype": "image",
        "shape": [height, width, 1],
        "names": ["height", "width", "channels"],
        "info": {"video.is_depth_map": True, "depth.unit": unit, "depth.invalid": 0},
    }


def plain_fps(fps: float) -> int | float:
    """lerobot writes whole frame rates as integers."""
    return int(fps) if float(fps).is_integer() else float(fps)


def write_episode(layout: Layout, episode: EpisodeToWrite) -> dict[str, Any]:
    """Write an episode's videos and table; returns its `record`."""
    values = episode.columns | standard_columns(episode, layout.fps) | episode.images
    for key, feature in layout.all_features.items():
        shape = tuple(feature["shape"])
        if shape[-1] == 1 and values[key].ndim == len(shape):
            shape = shape[:-1]  # one number, or one channel of depth
        if values[key].shape != (episode.length, *shape):
            raise DataError(
                "A column does not have the shape that its feature declares",
                file=episode.key,
                field=key,
                found=str(values[key].shape),
                expected=str((episode.length, *shape)),
                cure="record every episode with the same rows, dimensions and image sizes",
            )
    table, *videos = layout.files(episode.index)
    for path, camera in zip(videos, layout.cameras, strict=True):
        video.encode(layout.root / path, episode.images[camera], layout.fps, layout.video)
    write_table(layout.root / table, values, layout.all_features)
    return record(episode, episode_stats(values, layout.all_features))


def record(episode: EpisodeToWrite, stats: dict[str, Any]) -> dict[str, Any]:
    """What `finish` needs to know of a written episode, plain values."""
    row = {"episode_index": episode.index, "tasks": [episode.task], "length": episode.length}
    return {"row": row | episode.extra, "task_index": episode.task_index, "stats": stats}


def standard_columns(episode: EpisodeToWrite, fps: float) -> dict[str, np.ndarray]:
    """What every LeRobot table has: times, counters and the task's number."""
    rows = np.arange(episode.length, dtype=np.int64)
    return {
        "timestamp": (rows / fps).astype(np.float32),
        "frame_index": rows,
        "episode_index": np.full(len(rows), episode.index, np.int64),
        "index": episode.start + rows,
        "task_index": np.full(len(rows), episode.task_index, np.int64),
    }


def write_table(path: Path, columns: dict[str, np.ndarray], features: dict[str, dict[str, Any]]) -> None:
    """One episode's parquet file with the Hugging Face schema metadata that `datasets` writes and reads."""
    arrays, fields = [], []
    described: dict[str, dict[str, Any]] = {}
    for key, feature in features.items():
        if feature["dtype"] == "video":
            continue
        if feature["dtype"] == "image":
            cells = [{"bytes": _png(picture), "path": None} for picture in columns[key]]
            arrays.append(pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            described[key] = {"_type": "Image"}
            fields.append(pa.field(key, arrays[-1].type))
            continue
        kind, width = pa.type_for_alias(feature["dtype"]), feature["shape"][0]
        values = columns[key]
        if list(feature["shape"]) == [1]:
            arrays.append(pa.array(values.reshape(-1), kind))
            described[key] = {"dtype": feature["dtype"], "_type": "Value"}
        else:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.field("element", kind), width)))
            inner = {"dtype": feature["dtype"], "_type": "Value"}
            described[key] = {"feature": inner, "length": width, "_type": "Sequence"}
        fields.append(pa.field(key, arrays[-1].type))
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})
    with atomic_path(path) as partial:
        write_parquet(pa.Table.from_arrays(arrays, schema=schema), partial)


def _png(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 or (H, W) uint16 as PNG, without loss."""
    from PIL import Image  # only datasets that keep stills need it

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "PNG", compress_level=3)
    return out.getvalue()


def episode_stats(columns: dict[str, np.ndarray], features: dict[str, dict[str, Any]]) -> dict[str, dict[str, list]]:
    """min, max, mean, std (population), count of every feature over one episode, in lerobot's forms.

    Images are sampled and thinned as lerobot does it, and given per channel as [[[x]], [[x]], [[x]]] in 0-1; depth
    as [[[x]]] in its own steps.
    """
    out: dict[str, dict[str, list]] = {}
    for key, feature in features.items():
        values = columns[key]
        if feature["dtype"] in ("video", "image"):
            values = _thin(values[_sample(len(values))])
            parts = _depth_stats(values) if values.ndim == 3 else _channel_stats(values)
            out[key] = {name: part.reshape(-1, 1, 1).tolist() for name, part in parts.items()}
        else:
            if values.ndim == 1:
                values = values[:, None]
            wide = values.astype(np.float64)
            parts = {"min": values.min(0), "max": values.max(0), "mean": wide.mean(0), "std": wide.std(0)}
            out[key] = {name: part.tolist() for name, part in parts.items()}
        out[key]["count"] = [len(values)]
    return out


def _channel_stats(images: np.ndarray) -> dict[str, np.ndarray]:
    """min, max, mean, std per channel in 0-1 of (N, H, W, 3) uint8, exactly, from the counts of the 256 levels."""
    levels = np.arange(256) / 255.0
    from PIL import Image  # counts five times as fast as numpy

    flat = Image.fromarray(np.ascontiguousarray(images).reshape(-1, images.shape[2], 3))
    counts = np.array(flat.histogram()).reshape(3, 256)
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ levels
    return {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1)),
    }


def _depth_stats(images: np.ndarray) -> dict[str, np.ndarray]:
    """min, max, mean, std of (N, H, W) uint16 steps."""
    parts = {"min": images.min(), "max": images.max(), "mean": images.mean(), "std": images.std()}
    return {name: np.asarray(part, np.float64) for name, part in parts.items()}


def _sample(length: int) -> np.ndarray:
    """Frame indices that stand for an episode: all up to 100, about length ** 0.75 of longer ones."""
    number = max(min(length, 100), min(int(length**0.75), 10_000))
    return np.round(np.linspace(0, length - 1, number)).astype(int)


def _thin(images: np.ndarray) -> np.ndarray:
    """Every n-th pixel of images of 300 pixels or more, so that about 150 remain along the longer side."""
    height, width = images.shape[1:3]
    step = 1 if max(height, width) < 300 else max(height, width) // 150
    return images[:, ::step, ::step]


def finish(
    layout: Layout,
    records: Sequence[dict[str, Any]],
    splits: dict[str, range],
    contract: Contract | None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Write meta/ from the records of all episodes, in order, and remove what an interrupted run left behind. known:
    SHA-256 of files that need not be read again, by their paths."""
    tasks = {record["task_index"]: record["row"]["tasks"][0] for record in records}
    remove_strays(layout.root, [file for episode in range(len(records)) for file in layout.files(episode)])
    info = {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": layout.robot_type,
        **totals([record["row"]["length"] for record in records], len(tasks), len(layout.cameras)),
        "chunks_size": CHUNKS_SIZE,
        "fps": plain_fps(layout.fps),
        "splits": {name: f"{part.start}:{part.stop}" for name, part in splits.items()},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if layout.cameras else None,
        "features": layout.all_features,
    }
    stats = [{"episode_index": index, "stats": record["stats"]} for index, record in enumerate(records)]
    rows = [record["row"] for record in records]
    write_meta(layout.root, info, rows, tasks, stats, contract, known)


def write_meta(
    root: Path,
    info: dict[str, Any],
    rows: list[dict[str, Any]],
    tasks: dict[int, str],
    stats: list[dict[str, Any]],
    contract: Contract | None,
    known: Mapping[str, str] | None = None,
) -> None:
    """meta/: info.json in lerobot's own spelling, the three line files, the Contract, and at last the seal: whatever
    else belongs to the dataset must be written before."""
    meta = root / "meta"
    (root / SEAL).unlink(missing_ok=True)  # of an earlier, cut run: what is not finished is not sealed
    write_jsonl(meta / "tasks.jsonl", [{"task_index": index, "task": tasks[index]} for index in sorted(tasks)])
    write_jsonl(meta / "episodes.jsonl", rows)
    write_jsonl(meta / "episodes_stats.jsonl", stats)
    if contract is not None:  # a dataset of others, repaired
        contract.save(meta / "contract.json")
    write_text(meta / "info.json", json.dumps(info, indent=4, ensure_ascii=False, allow_nan=False))
    seal(root, known=known)


def numbered(table: pa.Table, counters: dict[str, np.ndarray]) -> pa.Table:
    """The table with these whole numbers in its counting columns; the same object where they are true already."""
    for key, values in counters.items():
        known = table.schema.field(key) if key in table.column_names else None
        if known is not None and np.array_equal(table.column(key).to_numpy(), values):
            continue
        column = pa.array(values)
        if known is None:
            table = table.append_column(pa.field(key, pa.int64()), column)
        else:
            field = known if known.type == pa.int64() else pa.field(key, pa.int64())
            table = table.set_column(table.column_names.index(key), field, column)
    return table


def counters(episode: int, start: int, rows: int) -> dict[str, np.ndarray]:
    """episode_index and index of an episode's rows. start: rows of all episodes before it."""
    return {"episode_index": np.full(rows, episode, np.int64), "index": start + np.arange(rows, dtype=np.int64)}


def take_file(old: Path, new: Path, link: Link) -> None:
    """Copy or link one file; one that stands there already with the same content is kept (a cut run goes on)."""
    if new.is_symlink() or link == "symlink":
        new.unlink(missing_ok=True)
    if link == "symlink":
        with explain_os_errors(new):
            new.parent.mkdir(parents=True, exist_ok=True)
            new.symlink_to(old.absolute())
        return
    if new.is_file() and new.stat().st_size == old.stat().st_size and digest_file(new) == digest_file(old):
        return
    with explain_os_errors(new):
        new.parent.mkdir(parents=True, exist_ok=True)
        if link == "hardlink":
            new.unlink(missing_ok=True)
            try:
                os.link(old.resolve(), new)  # of a link from the hub, the file that it leads to
                return
            except OSError as err:
                if err.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                    raise  # another file system or protected hard links: copying below does it
        with atomic_path(new) as partial:
            shutil.copyfile(old, partial)


def take_table(old: Path, new: Path, was: pa.Table, table: pa.Table, link: Link) -> None:
    """`take_file` of a table that is still what was read (`was`); else write it."""
    if table is was:
        take_file(old, new, link)
        return
    with atomic_path(new) as partial:
        write_parquet(table, partial)


def remove_strays(root: Path, wanted: Iterable[str]) -> None:
    """Delete files under data/ and videos/ that are none of `wanted`: halves that a killed process left."""
    keep = {root / path for path in wanted}
    for folder in ("data", "videos"):
        for path in sorted((root / folder).rglob("*")):
            if (path.is_file() or path.is_symlink()) and path not in keep:
                path.unlink()
