"""Laws between the files of a dataset: counts, order, time, splits, videos, subtasks, contract.

Each law yields findings and raises nothing; what single lines and cells must be is checked in `metadata` and `tables`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, EpisodeStatsRow, Info
from prts_core.data.validation.metadata import Metadata
from prts_core.data.validation.report import Finding
from prts_core.errors import DataError

TIME_TOLERANCE_S = 1e-4  # what lerobot allows between a timestamp and frame_index / fps
_INFO, _EPISODES = "meta/info.json", "meta/episodes.jsonl"


def law_totals(meta: Metadata, info: Info) -> Iterator[Finding]:
    """info.json's totals are the sums of what the other files hold."""
    episodes = len(meta.episodes)
    for name, expected in {
        "total_episodes": episodes,
        "total_frames": sum(row.length for row in meta.episodes),
        "total_tasks": len(meta.tasks),
        "total_videos": episodes * len(info.video_keys),
        "total_chunks": -(-episodes // info.chunks_size),
    }.items():
        found = getattr(info, name)
        if found != expected:
            yield Finding("totals", _INFO, f"{name}: {found}", f"{expected}, counted in the other files")


def law_numbering(meta: Metadata) -> Iterator[Finding]:
    """Episodes and tasks are numbered 0, 1, 2, ... in the order of their lines; no task stands twice."""
    for file, numbers in (
        (_EPISODES, [row.episode_index for row in meta.episodes]),
        ("meta/tasks.jsonl", sorted(row.task_index for row in meta.tasks)),
    ):
        for place, number in enumerate(numbers):
            if number != place:
                yield Finding("numbering", file, f"number {number}", f"number {place}: no gaps, none twice", row=place)
                break
    texts = [row.task for row in meta.tasks]
    for place, text in enumerate(texts):
        if text in texts[:place]:
            yield Finding("numbering", "meta/tasks.jsonl", f"task {text!r} twice", "one line per sentence", row=place)


def law_tasks(meta: Metadata) -> Iterator[Finding]:
    """Every sentence of an episode is a line of tasks.jsonl."""
    known = {row.task for row in meta.tasks}
    for line, row in enumerate(meta.episodes):
        for task in row.tasks:
            if task not in known:
                yield Finding("tasks", _EPISODES, f"task {task!r}", "a sentence of meta/tasks.jsonl", row=line)


def law_splits(meta: Metadata, info: Info) -> Iterator[Finding]:
    """Splits lie inside the dataset, do not meet, and one of them is train."""
    taken: dict[int, str] = {}
    if not len(info.split_ranges.get("train", ())):
        yield Finding("splits", _INFO, f"splits: {info.splits}", "a split train with at least one episode")
    for name, part in info.split_ranges.items():
        if part.stop > len(meta.episodes):
            yield Finding("splits", _INFO, f"{name}: {info.splits[name]}", f"an end of at most {len(meta.episodes)}")
        shared = [taken[index] for index in part if index in taken]
        if shared:
            yield Finding(
                "splits", _INFO, f"{name} shares {len(shared)} episodes with {shared[0]}", "splits that never meet"
            )
        taken |= dict.fromkeys(part, name)


def law_subtasks(meta: Metadata) -> Iterator[Finding]:
    """action_config spans lie inside the episode, in order, without overlap; success_row is a row of it."""
    for line, row in enumerate(meta.episodes):
        end = 0
        for number, span in enumerate(row.spans):
            where = f"action_config[{number}]: {span.start_frame} to {span.end_frame}"
            if not span.start_frame < span.end_frame <= row.length:
                yield Finding("subtasks", _EPISODES, where, f"a span inside rows 0 to {row.length}", row=line)
            elif span.start_frame < end:
                yield Finding(
                    "subtasks", _EPISODES, where, f"a start of at least {end}, where the span before ends", row=line
                )
            end = max(end, span.end_frame)
        if row.success_row is not None and row.success_row >= row.length:
            yield Finding(
                "subtasks", _EPISODES, f"success_row {row.success_row}", f"a row below {row.length}", row=line
            )


def law_contract(meta: Metadata, info: Info) -> Iterator[Finding]:
    """The Contract's widths, cameras and rate are those of the features."""
    contract, file, cure = meta.contract, "meta/contract.json", "run `prts convert` again: the Contract is made there"
    if contract is None:
        return
    for key, dimensions in ((STATE, contract.state), (ACTION, contract.action)):
        shape = info.features[key].shape if key in info.features else None
        if shape != (len(dimensions),):
            yield Finding("contract", file, f"{key}: {len(dimensions)} dimensions", f"shape {shape} of {_INFO}", cure)
    ours = {camera.key: (camera.height, camera.width) for camera in contract.cameras}
    theirs = {key: info.features[key].image_size for key in info.camera_keys}
    if ours != theirs:
        yield Finding("contract", file, f"cameras {ours}", f"cameras {theirs} of {_INFO}", cure)
    if contract.control_hz != info.fps:
        yield Finding("contract", file, f"control_hz {contract.control_hz}", f"fps {info.fps} of {_INFO}", cure)


def law_rows(frame: pl.DataFrame, row: EpisodeRow, start: int, info: Info, tasks: dict[int, str]) -> Iterator[Finding]:
    """One table's length, counters, times and task numbers. start: rows of all episodes before it."""
    file = info.data_file(row.episode_index)
    if frame.height != row.length:
        yield Finding("episode length", file, f"{frame.height} rows", f"{row.length} rows, as {_EPISODES} says")
    counters = np.arange(frame.height)
    expected = {
        "frame_index": counters,
        "index": start + counters,
        "episode_index": np.full(frame.height, row.episode_index),
    }
    for name, values in expected.items():
        if name in frame.columns:
            bad = np.flatnonzero(frame[name].fill_null(-1).to_numpy() != values)
            if len(bad):
                at = int(bad[0])
                found = f"{name} = {frame[name][at]} ({len(bad)} such rows)"
                yield Finding("row numbering", file, found, f"{values[at]}", row=at)
    if "timestamp" in frame.columns and frame["timestamp"].dtype.is_numeric():
        stamps = frame["timestamp"].fill_null(float("nan")).to_numpy()
        # float32 seconds: long episodes cannot hold 1e-4 s exactly
        allowed = TIME_TOLERANCE_S + np.spacing(np.abs(stamps).astype(np.float32))
        bad = np.flatnonzero(~(np.abs(stamps - counters / info.fps) <= allowed))
        if len(bad):
            at = int(bad[0])
            found = f"timestamp {stamps[at]:.6g} s ({len(bad)} such rows)"
            wanted = (
                f"{counters[at] / info.fps:.6g} s: frame_index / fps at {info.fps:g} fps, within {TIME_TOLERANCE_S} s"
            )
            yield Finding(
                "timestamps", file, found, wanted, row=at, cure="correct fps in info.json, or resample the episode"
            )
    if "task_index" in frame.columns:
        for number in frame["task_index"].drop_nulls().unique().to_list():
            if tasks.get(number) not in row.tasks:
                expected_tasks = f"a task of this episode: {row.tasks}"
                yield Finding("tasks", file, f"task_index {number} ({tasks.get(number)!r})", expected_tasks)


def law_stats(frame: pl.DataFrame, row: EpisodeRow, stats: EpisodeStatsRow | None, info: Info) -> Iterator[Finding]:
    """episodes_stats.jsonl has the episode; its min and max are those of the table (else a warning: they are stale)."""
    file = "meta/episodes_stats.jsonl"
    if stats is None:
        cure = "write them with lerobot's convert_dataset_v20_to_v21"
        yield Finding(
            "episode statistics", file, f"no line for episode {row.episode_index}", "one line per episode", cure
        )
        return
    for key in (STATE, ACTION):
        if key not in frame.columns or key not in info.features or key not in stats.stats:
            continue
        cells = frame[key].to_list() if frame[key].dtype.is_nested() else [[x] for x in frame[key].to_list()]
        if len({len(cell) if cell is not None else -1 for cell in cells}) != 1 or not cells or cells[0] is None:
            continue  # already a finding of the table
        values = np.array(cells, np.float64)
        if not np.isfinite(values).all():
            continue
        for name, ours in (("min", values.min(0)), ("max", values.max(0))):
            theirs = np.array(getattr(stats.stats[key], name), np.float64).reshape(-1)
            if theirs.shape != ours.shape or not np.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
                found = f"{key}.{name} of episode {row.episode_index} is not the table's"
                cure = (
                    "nothing here reads these statistics; lerobot does: write them again before you publish the dataset"
                )
                yield Finding("episode statistics", file, found, "statistics of the data", cure, severity="warning")
                break


def law_video(root: Path, row: EpisodeRow, key: str, info: Info, every: bool) -> Iterator[Finding]:
    """One video exists, has the feature's size and rate, one frame a row, and can be decoded."""
    file = info.video_file(row.episode_index, key)
    feature = info.features[key]
    try:
        facts = video.probe(root / file)
        frames = video.decode_check(root / file, every)
    except DataError as err:
        yield Finding("videos", file, f"{err.problem}: {err.found or 'no such file'}", "a whole video", err.cure or "")
        return
    if frames != row.length:
        yield Finding("videos", file, f"{frames} frames", f"{row.length} frames, one for each row of its table")
    if (facts.height, facts.width) != feature.image_size:
        height, width = feature.image_size
        yield Finding("videos", file, f"{facts.width}x{facts.height} pixels", f"{width}x{height}, as info.json says")
    if abs(facts.fps - info.fps) > 0.01 * info.fps:
        yield Finding("videos", file, f"{facts.fps:g} frames a second", f"{info.fps:g}, as info.json says")
