"""Check what must hold between the files of a dataset: counts, order, time, splits, subtasks, contract.

Each law yields findings and raises nothing; what single lines and cells must be is checked in `metadata` and `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, Info
from prts_core.data.validation.episode import numbers
from prts_core.data.validation.metadata import Metadata
from prts_core.data.validation.report import Finding

TIME_TOLERANCE_S = 1e-4  # what lerobot allows between a timestamp and frame_index / fps
_INFO, _CONTRACT = "meta/info.json", "meta/contract.json"


def law_totals(meta: Metadata, info: Info) -> Iterator[Finding]:
    """info.json's totals are the sums of what the other files hold."""
    lengths = [row.length for row in meta.episodes]
    for name, expected in info.counted(lengths, len(meta.tasks)).items():
        if (found := getattr(info, name)) != expected:
            yield Finding("totals", _INFO, f"{name}: {found}", f"{expected}, counted in the other files")


def law_numbering(meta: Metadata, info: Info) -> Iterator[Finding]:
    """Episodes and tasks are numbered 0, 1, 2, ... in the order of their lines; no task stands twice."""
    for file, listed in (
        (info.tables["episodes"], [row.episode_index for row in meta.episodes]),
        (info.tables["tasks"], sorted(row.task_index for row in meta.tasks)),
    ):
        wrong = next(((place, number) for place, number in enumerate(listed) if number != place), None)
        if wrong is not None:
            place, number = wrong
            yield Finding("numbering", file, f"number {number}", f"number {place}: no gaps, none twice", row=place)
    seen: set[str] = set()
    for place, row in enumerate(meta.tasks):
        if row.task in seen:
            yield Finding(
                "numbering", info.tables["tasks"], f"task {row.task!r} twice", "one line per sentence", row=place
            )
        seen.add(row.task)


def law_tasks(meta: Metadata, info: Info) -> Iterator[Finding]:
    """Every sentence of an episode is a line of tasks.jsonl."""
    known = {row.task for row in meta.tasks}
    for line, row in enumerate(meta.episodes):
        for task in (task for task in row.tasks if task not in known):
            yield Finding(
                "tasks", info.tables["episodes"], f"task {task!r}", f"a sentence of {info.tables['tasks']}", row=line
            )


def law_splits(meta: Metadata, info: Info) -> Iterator[Finding]:
    """Splits lie inside the dataset, do not meet, and one of them is train."""
    if not len(info.split_ranges.get("train", ())):
        yield Finding("splits", _INFO, f"splits: {info.splits}", "a split train with at least one episode")
    parts = list(info.split_ranges.items())
    for number, (name, part) in enumerate(parts):
        if part.stop > len(meta.episodes):
            yield Finding("splits", _INFO, f"{name}: {info.splits[name]}", f"an end of at most {len(meta.episodes)}")
        for other, taken in parts[:number]:  # by ends: a wrong split may name more episodes than memory holds
            shared = min(part.stop, taken.stop) - max(part.start, taken.start)
            if shared > 0:
                found = f"{name} shares {shared} episodes with {other}"
                yield Finding("splits", _INFO, found, "splits that never meet")


def law_subtasks(meta: Metadata, info: Info) -> Iterator[Finding]:
    """action_config spans lie inside the episode, in order, without overlap; success_row is a row of it."""
    for line, row in enumerate(meta.episodes):
        end = 0
        for number, span in enumerate(row.spans):
            expected = None
            if not span.start_frame < span.end_frame <= row.length:
                expected = f"a span inside rows 0 to {row.length}"
            elif span.start_frame < end:
                expected = f"a start of at least {end}, where the span before ends"
            if expected is not None:
                found = f"action_config[{number}]: {span.start_frame} to {span.end_frame}"
                yield Finding("subtasks", info.tables["episodes"], found, expected, row=line)
            end = max(end, span.end_frame)
        if row.success_row is not None and row.success_row >= row.length:
            found = f"success_row {row.success_row}"
            yield Finding("subtasks", info.tables["episodes"], found, f"a row below {row.length}", row=line)


def law_contract(meta: Metadata, info: Info) -> Iterator[Finding]:
    """The Contract's widths, cameras and rate are those of the features."""
    contract, cure = meta.contract, "run `prts convert` again: the Contract is made there"
    if contract is None:
        return
    pairs: list[tuple[object, object, str, str]] = []
    for key, dimensions in ((STATE, contract.state), (ACTION, contract.action)):
        shape = info.features[key].shape if key in info.features else None
        pairs.append(((len(dimensions),), shape, f"{key}: {len(dimensions)} dimensions", f"shape {shape}"))
    cameras = {camera.key: (camera.height, camera.width) for camera in contract.cameras}
    shown = {key: info.features[key].image_size for key in info.camera_keys}
    pairs.append((cameras, shown, f"cameras {cameras}", f"cameras {shown}"))
    rate = contract.control_hz
    for ours, theirs, found, expected in (*pairs, (rate, info.fps, f"control_hz {rate}", f"fps {info.fps}")):
        if ours != theirs:
            yield Finding("contract", _CONTRACT, found, f"{expected} of {_INFO}", cure)


# Laws of the metadata, by the name that reports give them.
LAWS: dict[str, Callable[[Metadata, Info], Iterator[Finding]]] = {
    "totals": law_totals,
    "numbering": law_numbering,
    "tasks": law_tasks,
    "splits": law_splits,
    "subtasks": law_subtasks,
    "contract": law_contract,
}


def law_rows(table: pa.Table, row: EpisodeRow, start: int, info: Info, tasks: dict[int, str]) -> Iterator[Finding]:
    """One table's length, counters, times and task numbers. start: rows of all episodes before it."""
    file, counters = info.data_name(row.episode_index), np.arange(table.num_rows)
    if table.num_rows != row.length:
        yield Finding(
            "episode length", file, f"{table.num_rows} rows", f"{row.length} rows, as {info.tables['episodes']} says"
        )
    wanted = {"frame_index": counters, "index": start + counters}
    for name, expected in (wanted | {"episode_index": np.full(len(counters), row.episode_index)}).items():
        values = numbers(table, name)
        if values is not None and len(bad := np.flatnonzero(values != expected)):
            at = int(bad[0])
            found = f"{name} = {values[at]} ({len(bad)} such rows)"
            yield Finding("row numbering", file, found, f"{expected[at]}", row=at)
    stamps, seconds = numbers(table, "timestamp"), counters / info.fps
    if stamps is not None:
        # float32 seconds: long episodes cannot hold 1e-4 s exactly
        allowed = TIME_TOLERANCE_S + np.spacing(seconds.astype(np.float32))
        if len(bad := np.flatnonzero(~(np.abs(stamps - seconds) <= allowed))):
            at = int(bad[0])
            found = f"timestamp {stamps[at]:.6g} s ({len(bad)} such rows)"
            expected = f"{seconds[at]:.6g} s: frame_index / fps at {info.fps:g} fps, within {TIME_TOLERANCE_S} s"
            yield Finding("timestamps", file, found, expected, "correct fps in info.json, or resample the episode", at)
    indices = numbers(table, "task_index")
    if indices is not None:
        for number in np.unique(indices[np.isfinite(indices)]).tolist():
            if tasks.get(number) not in row.tasks:
                found = f"task_index {number} ({tasks.get(number)!r})"
                yield Finding("tasks", file, found, f"a task of this episode: {row.tasks}")
