"""Laws between the files of a dataset: counts, order, time, splits, subtasks, contract.

Each law yields findings and raises nothing; what single lines and cells must be is checked in `metadata` and `tables`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, Info
from prts_core.data.validation.episode import numbers
from prts_core.data.validation.metadata import Metadata
from prts_core.data.validation.report import Finding

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
    for file, listed in (
        (_EPISODES, [row.episode_index for row in meta.episodes]),
        ("meta/tasks.jsonl", sorted(row.task_index for row in meta.tasks)),
    ):
        for place, number in enumerate(listed):
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
    before: dict[str, range] = {}
    if not len(info.split_ranges.get("train", ())):
        yield Finding("splits", _INFO, f"splits: {info.splits}", "a split train with at least one episode")
    for name, part in info.split_ranges.items():
        if part.stop > len(meta.episodes):
            yield Finding("splits", _INFO, f"{name}: {info.splits[name]}", f"an end of at most {len(meta.episodes)}")
        for other, taken in before.items():  # by their ends: a wrong split may name more episodes than memory holds
            shared = min(part.stop, taken.stop) - max(part.start, taken.start)
            if shared > 0:
                found = f"{name} shares {shared} episodes with {other}"
                yield Finding("splits", _INFO, found, "splits that never meet")
        before[name] = part


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


def law_rows(table: pa.Table, row: EpisodeRow, start: int, info: Info, tasks: dict[int, str]) -> Iterator[Finding]:
    """One table's length, counters, times and task numbers. start: rows of all episodes before it."""
    file = info.data_file(row.episode_index)
    if table.num_rows != row.length:
        yield Finding("episode length", file, f"{table.num_rows} rows", f"{row.length} rows, as {_EPISODES} says")
    counters = np.arange(table.num_rows)
    expected = {
        "frame_index": counters,
        "index": start + counters,
        "episode_index": np.full(table.num_rows, row.episode_index),
    }
    for name, wanted in expected.items():
        values = numbers(table, name)
        if values is not None:
            bad = np.flatnonzero(values != wanted)
            if len(bad):
                at = int(bad[0])
                found = f"{name} = {values[at]} ({len(bad)} such rows)"
                yield Finding("row numbering", file, found, f"{wanted[at]}", row=at)
    stamps = numbers(table, "timestamp")
    if stamps is not None:
        # float32 seconds: long episodes cannot hold 1e-4 s exactly
        allowed = TIME_TOLERANCE_S + np.spacing(np.abs(counters / info.fps).astype(np.float32))
        bad = np.flatnonzero(~(np.abs(stamps - counters / info.fps) <= allowed))
        if len(bad):
            at = int(bad[0])
            found = f"timestamp {stamps[at]:.6g} s ({len(bad)} such rows)"
            said = (
                f"{counters[at] / info.fps:.6g} s: frame_index / fps at {info.fps:g} fps, within {TIME_TOLERANCE_S} s"
            )
            cure = "correct fps in info.json, or resample the episode"
            yield Finding("timestamps", file, found, said, row=at, cure=cure)
    indices = numbers(table, "task_index")
    if indices is not None:
        for number in np.unique(indices[np.isfinite(indices)]).tolist():
            if tasks.get(number) not in row.tasks:
                expected_tasks = f"a task of this episode: {row.tasks}"
                yield Finding("tasks", file, f"task_index {number} ({tasks.get(number)!r})", expected_tasks)
