"""Read off an episode what each stretch of its rows was asked to do, and whether and where that was reached.

`next.success` is what a dataset records of it. Where it records nothing, a demonstration is taken to end at its goal;
where it is recorded and never true, the episode failed. The two are never mixed up.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import DataError

SUCCESS, TASK = "next.success", "task_index"


@dataclass(frozen=True)
class Stretch:
    """Rows [start, end) of one episode under one instruction. goal: the row at which it was reached; none: it was
    not."""

    start: int
    end: int
    instruction: str
    goal: int | None

    def steps_to_go(self) -> np.ndarray:
        """(end - start,) int64: how many rows each row is before the goal, 0 from there on; -1: the goal was not
        reached."""
        if self.goal is None:
            return np.full(self.end - self.start, -1)
        return np.clip(self.goal - np.arange(self.start, self.end), 0, None)


def stretches(dataset: LeRobotDataset, episode: int) -> list[Stretch]:
    """The episode's stretches in order; one where all its rows have the same `task_index`.

    A stretch's goal is its first row with `next.success`. A stretch before the last that has no such row ended at its
    last row: what came next was asked for then. Of the last one that means failure, where success is recorded at all.
    """
    known = SUCCESS in dataset.info.features
    columns = dataset.columns(episode, [TASK, *([SUCCESS] if known else [])])
    tasks, success = columns[TASK].reshape(-1), columns[SUCCESS].reshape(-1) if known else None
    bounds = [0, *(np.flatnonzero(np.diff(tasks)) + 1).tolist(), len(tasks)]
    found = []
    for start, end in pairwise(bounds):
        index = int(tasks[start])
        if index not in dataset.tasks:
            raise DataError(
                "A row is of a task that the dataset does not name",
                file=dataset.root / dataset.info.data_file(episode),
                field=f"row {start}, {TASK}",
                found=index,
                expected="an index of meta/tasks.jsonl",
                cure="`prts validate` names every such row",
            )
        goal: int | None = end - 1
        if success is not None:
            reached = np.flatnonzero(success[start:end])
            if len(reached):
                goal = start + int(reached[0])
            elif end == len(tasks):
                goal = None
        found.append(Stretch(start, end, dataset.tasks[index], goal))
    return found


def goal_row(dataset: LeRobotDataset, episode: int) -> int | None:
    """The row at which the episode reached its last goal; none: it failed."""
    return stretches(dataset, episode)[-1].goal
