"""Index a dataset: a few numbers an episode, made once by stage stats and memory-mapped by everybody that trains on it.

A folder of plain .npy files and index.json. It says where every stretch of every episode begins and ends, what it was
asked to do, whether and where that was reached, and which subtasks it shows: about 0.3 bytes a row of a dataset with
episodes of 200 rows, in the page cache once however many processes read it. Rows themselves stay in their tables.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.data.ahead import in_order
from prts_core.data.goals import SUCCESS, Stretch, stretches
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.remote import REMOTE
from prts_core.data.lerobot_v21.seal import SEAL
from prts_core.data.subtasks import Subtasks
from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path, digest_file, read_json, write_json
from prts_core.io.progress import track

FORMAT = 1
INDEX = "index"  # folder in the output of stage stats
NOT_RECORDED, FAILED, REACHED = -1, 0, 1  # `success` of a stretch; the first was taken to reach its goal at its end
# Rows are counted within the episode. goal: -1 where it was not reached. text: of the subtasks' sentences.
STRETCH = np.dtype([(name, "<i4") for name in ("start", "end", "task", "goal")] + [("success", "i1")])
SPAN = np.dtype([("end", "<i4"), ("text", "<i4")])
_ARRAYS = ("stretches", "first_stretch", "spans", "first_span")
_CURE = "make the statistics again: prts stats"


@dataclass(frozen=True)
class DatasetIndex:
    """stretches (N,) of STRETCH and spans (M,) of SPAN, episode after episode; those of episode e are
    first_stretch[e] : first_stretch[e + 1] and first_span[e] : first_span[e + 1], int64. tasks {task_index: sentence};
    texts: the sentences of subtasks, each once. described: the dataset as `described` has it."""

    stretches: np.ndarray
    first_stretch: np.ndarray
    spans: np.ndarray
    first_span: np.ndarray
    tasks: dict[int, str]
    texts: list[str]
    described: dict[str, Any]

    @staticmethod
    def of(dataset: LeRobotDataset, workers: int = 2) -> DatasetIndex:
        """Read the tables and metadata of a whole dataset. Raises DataError as `stretches` and `Subtasks.of_episode`.

        Memory: some 50 bytes an episode, besides `dataset.rows`.
        """
        known = SUCCESS in dataset.info.features
        numbers, first, spans, first_span = array("i"), array("q", [0]), array("i"), array("q", [0])
        indices = {sentence: index for index, sentence in reversed(dataset.tasks.items())}
        texts: dict[str, int] = {}
        episodes = dataset.episodes()
        read = in_order(lambda episode: stretches(dataset, episode), episodes, workers, 4)
        for episode, found in zip(episodes, track(read, total=len(episodes), what="indexing"), strict=True):
            for one in found:
                success = NOT_RECORDED if not known else FAILED if one.goal is None else REACHED
                goal = -1 if one.goal is None else one.goal
                numbers.extend((one.start, one.end, indices[one.instruction], goal, success))
            first.append(first[-1] + len(found))
            told = Subtasks.of_episode(dataset.rows[episode], dataset.root)
            for end, text in zip(told.ends, told.texts, strict=True):
                spans.extend((end, texts.setdefault(text, len(texts))))
            first_span.append(first_span[-1] + len(told.texts))
        return DatasetIndex(
            _records(numbers, STRETCH),
            np.array(first, np.int64),
            _records(spans, SPAN),
            np.array(first_span, np.int64),
            dict(dataset.tasks),
            list(texts),
            described(dataset.root),
        )

    def save(self, folder: Path) -> None:
        """Equal datasets give equal bytes."""
        for name in _ARRAYS:
            with atomic_path(folder / f"{name}.npy") as partial, partial.open("wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
        tasks = {str(index): task for index, task in self.tasks.items()}
        about = {"format": FORMAT, "dataset": self.described, "tasks": tasks, "texts": self.texts}
        write_json(folder / "index.json", about)

    @staticmethod
    def open(folder: Path, root: Path) -> DatasetIndex:
        """Map the index in `folder`. DataError where it is damaged, or not of the dataset at `root`."""
        path = folder / "index.json"
        if not path.is_file():
            raise DataError("Statistics lack the index that training reads", file=path, expected="a file", cure=_CURE)
        raw = read_json(path)
        found, wanted = ({"format": raw.get("format")}, {"format": FORMAT})
        if found == wanted:
            found, wanted = raw.get("dataset"), described(root)
        if found != wanted:
            raise DataError(
                "An index is of another format, or of another dataset",
                file=path,
                found=str(found)[:200],
                expected=str(wanted)[:200],
                cure=_CURE,
            )
        try:
            table, first, spans, first_span = (
                np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in _ARRAYS
            )
            tasks = {int(index): str(task) for index, task in raw["tasks"].items()}
            made = DatasetIndex(table, first, spans, first_span, tasks, list(raw["texts"]), raw["dataset"])
            made._check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
            problem, told = "An index is damaged", f"{type(err).__name__}: {err}"
            raise DataError(problem, file=folder, found=told[:200], cure=_CURE) from err
        return made

    def _check(self) -> None:
        """ValueError where the arrays do not fit one another."""
        for records, kind, first in (
            (self.stretches, STRETCH, self.first_stretch),
            (self.spans, SPAN, self.first_span),
        ):
            whole = first.dtype == np.int64 and first.ndim == 1 and len(first) and first[0] == 0
            if records.dtype != kind or not whole or first[-1] != len(records) or (first[1:] < first[:-1]).any():
                raise ValueError("the arrays do not fit one another")
        if len(self.first_stretch) != len(self.first_span) or (np.diff(self.first_stretch) < 1).any():
            raise ValueError("an episode has no rows")

    @property
    def lengths(self) -> np.ndarray:
        """(episodes,) int32: rows of each."""
        return self.stretches["end"][self.first_stretch[1:] - 1]

    @property
    def bytes(self) -> int:
        """Of the arrays, shared by all that map them, and of the sentences, which everybody holds."""
        texts = sum(map(sys.getsizeof, (*self.tasks.values(), *self.texts)))
        return sum(getattr(self, name).nbytes for name in _ARRAYS) + texts

    def stretches_of(self, episodes: np.ndarray) -> np.ndarray:
        """(N,) int64: places in `stretches` of all that these episodes have, in their order."""
        begin, end = self.first_stretch[episodes], self.first_stretch[episodes + 1]
        counts = end - begin
        return np.repeat(end - counts.cumsum(), counts) + np.arange(int(counts.sum()))

    def episode_of(self, stretches: np.ndarray | int) -> np.ndarray:
        """The episodes that stretches at these places belong to."""
        return np.searchsorted(self.first_stretch, stretches, side="right") - 1

    def subtasks(self, episode: int) -> Subtasks:
        """Of an episode, with its stretches."""
        own = slice(*self.first_stretch[episode : episode + 2].tolist())
        made = tuple(
            Stretch(start, end, self.tasks[task], None if goal < 0 else goal)
            for start, end, task, goal, _ in self.stretches[own].tolist()
        )
        spans = self.spans[slice(*self.first_span[episode : episode + 2].tolist())].tolist()
        texts, ends = tuple(self.texts[text] for _, text in spans), tuple(end for end, _ in spans)
        return Subtasks(made[0].instruction, made[-1].end, texts, ends, made)


def open_indexed(root: Path, stats: Path) -> tuple[LeRobotDataset, DatasetIndex]:
    """The dataset at `root`, its index read from the output of stage stats; of v2.1 no line is read an episode."""
    index = DatasetIndex.open(stats / INDEX, root)
    return LeRobotDataset.open(root, index.lengths), index


def described(root: Path) -> dict[str, Any]:
    """What tells a dataset from another one without reading its tables: the digest of info.json, the sizes of the other
    files under meta/. Where its files lie does not count."""
    meta, apart = root / "meta", (root / SEAL, root / REMOTE, root / "meta/info.json")
    others = [
        {"path": path.relative_to(meta).as_posix(), "size": path.stat().st_size}
        for path in sorted(meta.rglob("*"))
        if path.is_file() and path.name[0] != "." and path not in apart
    ]
    return {"info": digest_file(meta / "info.json"), "files": others}


def _records(numbers: array[int], kind: np.dtype) -> np.ndarray:
    """A flat list of numbers as records of `kind`."""
    names = kind.names or ()
    table = np.array(numbers, np.int32).reshape(-1, len(names))
    out = np.empty(len(table), kind)
    for column, name in enumerate(names):
        out[name] = table[:, column]
    return out
