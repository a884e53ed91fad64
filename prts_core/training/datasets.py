"""A LeRobot dataset, or an image-text one, as the trainer draws from it: sample number -> words, numbers and pictures,
read when asked for.

What a sample says and how it is normalised is the processor's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from prts_core.config.subtask_mode import SubtaskMode
from prts_core.config.train import Failures
from prts_core.contract import require_equal
from prts_core.data.ahead import run_parallel
from prts_core.data.augment import augment_view
from prts_core.data.goals import SUCCESS
from prts_core.data.images import resize_for_model
from prts_core.data.index import DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.llava import LlavaDataset
from prts_core.data.subtasks import Subtasks, sentences
from prts_core.io.errors import DataError
from prts_core.io.files import digest_bytes, digest_value
from prts_core.io.progress import track
from prts_core.policy.processor import Processor
from prts_core.text import prompt
from prts_core.text.sequence import ConversationBuilder, ImageTokens, Sample, TokenSequence
from prts_core.training.batch import OneByOne, TrainingSample, chunk_windows
from prts_core.training.episodes import EpisodeReader
from prts_core.training.shared_files import SharedFiles


class RobotDataset:
    """Rows of some episodes as samples (a `SampleSource`). train_subtask: see prts_core.data.subtasks.

    index: of the whole dataset. say_subtask: the subtask is what the policy says before it acts (stage subtask), not
    what it is told. failures: what becomes of rows whose goal was not reached (`TrainConfig.failures`). shared: where
    the processes of the run keep what they make once; pictures are kept decoded there while it has room.

    In memory are one number for each stretch of the episodes and the tables that were read last; chunk, state and FAST
    tokens are made when a sample is asked for, FAST only where a loss reads it.
    """

    def __init__(
        self,
        name: str,
        dataset: LeRobotDataset,
        index: DatasetIndex,
        processor: Processor,
        episodes: Sequence[int],
        *,
        augmented: bool = False,
        train_subtask: bool | str | None = None,
        say_subtask: bool = False,
        failures: Failures = "leave_out",
        shared: SharedFiles | None = None,
        threads: int = 2,
    ) -> None:
        require_equal(dataset.contract, processor.contract.contract, left_name=f"dataset {name}", right_name="policy")
        if not len(episodes):
            raise DataError(
                "A dataset has no episodes to train on",
                file=dataset.root,
                field="split train",
                found=0,
                expected="at least one episode",
                cure="look at splits in meta/info.json",
            )
        self.name = name.replace("__", "/")  # metrics say the repo_id, whose slash no partition name can hold
        self.processor, self.index, self.reader = processor, index, EpisodeReader(dataset)
        self.augmented, self.say_subtask, self.failures = augmented, say_subtask, failures
        self.row_s = 1.0 / dataset.fps
        self.mode = SubtaskMode.parse(train_subtask, dataset.root)
        self.shared, self.threads = shared or SharedFiles(), threads
        # Samples are the rows of `taken`, places of stretches in the index, one after another; first: of each.
        taken = index.stretches_of(np.asarray(episodes, np.int64))
        if failures == "leave_out":
            taken = taken[index.stretches["goal"][taken] >= 0]
        if not len(taken):
            raise DataError(
                "No episode reached its goal",
                file=dataset.root,
                field=SUCCESS,
                found=f"never true in {len(episodes)} episodes",
                expected="at least one that succeeds; a dataset without this column is taken to succeed",
                cure="look at how success was recorded, or say train.failures=negatives or clone",
            )
        self.taken = taken
        rows = index.stretches["end"][taken] - index.stretches["start"][taken]
        self.first = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._pictures = self._keep_pictures()
        self._known = lru_cache(maxsize=4096)(index.subtasks)
        self._task_id = lru_cache(maxsize=4096)(lambda text: prompt.task_id(text, processor.compat))

    @cached_property
    def episodes(self) -> np.ndarray:
        """(E,) int64: those that samples are taken from, in the order in which they were named."""
        return self.index.episode_of(self.taken[self._opening])

    @cached_property
    def _opening(self) -> np.ndarray:
        """Places in `taken` of each episode's first stretch."""
        of = self.index.episode_of(self.taken)
        return np.flatnonzero(np.diff(of, prepend=-1))

    def _keep_pictures(self) -> dict[str, tuple[np.ndarray, dict[int, int]]]:
        """camera -> (its decoded pictures, the first of each episode); empty where there is no room for all of them."""
        sizes = {key: (s, s) if isinstance(s, int) else s for key, s in self.processor.view_sizes.items()}
        lengths = self.index.lengths[self.episodes]
        rows = int(lengths.sum(dtype=np.int64))
        if not self.shared.claim(rows * sum(height * width * 3 for height, width in sizes.values())):
            return {}
        episodes = self.episodes.tolist()
        first = dict(zip(episodes, (np.cumsum(lengths) - lengths).tolist(), strict=True))
        kept = {}
        for camera, size in self.processor.view_sizes.items():

            def fill(into: np.ndarray, camera: str = camera, size: int | tuple[int, int] = size) -> None:
                def decode(episode: int) -> None:
                    frames = self.reader.dataset.frames(episode, camera, size=size)
                    into[first[episode] : first[episode] + len(frames)] = frames

                run_parallel(decode, episodes, self.threads, f"decoding {self.name}")

            name = self._file("pictures", camera=camera, size=size)
            kept[camera] = (self.shared.array(name, (rows, *sizes[camera], 3), np.uint8, fill), first)
        return kept

    def _file(self, what: str, **options: object) -> str:
        """The name of a shared file: another one for other episodes or options."""
        of = {"dataset": self.index.described, "episodes": digest_bytes(self.taken.tobytes()), **options}
        return f"{what}-{self.name.replace('/', '__')}-{digest_value(of)[-12:]}"

    def __len__(self) -> int:
        return int(self.first[-1])

    def places(self, samples: np.ndarray) -> tuple[list[int], list[int]]:
        """Of each sample the episode, and the row in it."""
        if len(samples) and not 0 <= samples.min() <= samples.max() < len(self):
            raise IndexError(f"samples {samples.min()} to {samples.max()} of {len(self)}")
        position = np.searchsorted(self.first, samples, side="right") - 1
        stretch = self.taken[position]
        rows = self.index.stretches["start"][stretch] + samples - self.first[position]
        return self.index.episode_of(stretch).tolist(), rows.tolist()

    @cached_property
    def tasks(self) -> frozenset[int]:
        return frozenset(map(self._task_id, self._told()))

    def _told(self) -> Iterable[str]:
        """Every instruction that a sample may have."""
        index, episodes = self.index, self.episodes
        marked = index.first_span[episodes + 1] > index.first_span[episodes]
        if self.mode.kind == "cumulate" and marked.any():  # what was said before depends on the episode
            return sentences((self._episode(e) for e in episodes.tolist()), self.mode)
        taken, spans = self.taken, []
        if self.mode.kind in ("replace", "mixture") and marked.any():
            shown = np.zeros(len(index.lengths), bool)
            shown[episodes[marked]] = True
            spans = np.unique(index.spans["text"][np.repeat(shown, np.diff(index.first_span))]).tolist()
            if self.mode.kind == "replace":
                taken = taken[~shown[index.episode_of(taken)]]
        tasks = np.unique(index.stretches["task"][taken]).tolist()
        return [*(index.tasks[task] for task in tasks), *(index.texts[text] for text in spans)]

    def _episode(self, episode: int) -> Subtasks:
        """The episode with the stretches alone that samples are taken from."""
        found = self.index.subtasks(episode)
        taken = (one for one in found.stretches if one.goal is not None or self.failures != "leave_out")
        return replace(found, stretches=tuple(taken))

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        """Counted once for all processes of a run: every row's action is tokenized for it where a loss reads FAST."""
        asked = {"response": response, "contrastive": contrastive}
        options: dict[str, object] = {"mode": repr(self.mode), "say_subtask": self.say_subtask}

        def fill(into: np.ndarray) -> None:
            at = dict(zip(self.episodes.tolist(), self.first[self._opening].tolist(), strict=True))

            def count(episode: int) -> None:
                found = self._count(episode, **asked)
                into[at[episode] : at[episode] + len(found)] = found

            run_parallel(count, self.episodes.tolist(), self.threads, f"measuring {self.name}")

        return self.shared.array(self._file("lengths", **asked, **options), (len(self),), np.uint16, fill)

    def _count(self, episode: int, *, response: bool, contrastive: bool) -> np.ndarray:
        """Tokens of an episode's samples, in order."""
        builder, task = self.processor.builder, self._episode(episode)
        states, actions = self.reader.numbers(episode)
        length = self.processor.contract.chunk_length
        rows = np.concatenate([np.arange(one.start, one.end) for one in task.stretches])
        fast = np.zeros(len(rows), np.int64)
        if response or contrastive:
            parts = [chunk_windows(actions[one.start : one.end], length)[0] for one in task.stretches]
            fast = np.array([len(ids) for ids in self.processor.fast_tokens(np.concatenate(parts), states[rows])])
        state = np.array([len(ids) for ids in builder.encode_states(self.processor.state_bins(states[rows]))])
        # Words change where a stretch or a subtask begins, and nowhere else.
        told, said = np.zeros((2, task.length), np.int64)
        cuts = {task.length, *task.ends, *(one.start for one in task.stretches), *(one.end for one in task.stretches)}
        shown = SubtaskMode("cumulate" if self.mode.kind == "cumulate" else "replace")
        for start, end in pairwise(sorted({0, *cuts})):
            texts = {task.stretch(start).instruction}
            if self.mode.kind != "off":  # which one is drawn is the sample's own matter; the longer one is room enough
                texts.add(task.target(shown, start, 0)[0])
            told[start:end] = max(len(builder.instruction(text)) for text in texts)
            if self.say_subtask:
                said[start:end] = builder.subtask_length(task.at(start).text)
        found = builder.lengths(state, fast, told[rows], response=response, contrastive=contrastive) + said[rows]
        if found.max() >= 2**16:
            raise DataError("A sample has too many tokens", field=f"episode {episode}", found=int(found.max()))
        return found

    def pictures(self, sample: int) -> list[np.ndarray]:
        """The sample's views, (H, W, 3) uint8 each, as they are before augmentation."""
        (episode,), (row,) = self.places(np.array([sample]))
        return self._views(episode, row)

    def _views(self, episode: int, row: int) -> list[np.ndarray]:
        if self._pictures:
            return [frames[first[episode] + row] for frames, first in self._pictures.values()]
        return [self.reader.rgb(episode, key, row, size) for key, size in self.processor.view_sizes.items()]

    def items(
        self, rows: Sequence[int], rngs: Sequence[np.random.Generator], *, response: bool, contrastive: bool
    ) -> list[TrainingSample]:
        processor, episodes, at = self.processor, *self.places(np.asarray(rows))
        numbers = [self.reader.numbers(episode) for episode in episodes]
        known = [self._known(episode) for episode in episodes]
        own = [task.stretch(row) for task, row in zip(known, at, strict=True)]
        # A chunk ends where its instruction does: what comes next was done for another one, or failed.
        last = np.array([stretch.end for stretch in own])[:, None] - 1
        steps = np.array(at)[:, None] + np.arange(processor.contract.chunk_length)
        is_pad = steps > last
        chunks = np.stack([actions[i] for (_, actions), i in zip(numbers, steps.clip(max=last), strict=True)])
        states = np.stack([states[row] for (states, _), row in zip(numbers, at, strict=True)])
        words = processor.builder.encode_states(processor.state_bins(states))
        fast = processor.fast_tokens(chunks, states) if response or contrastive else [None] * len(at)
        normalized = processor.normalize_actions(chunks, states)
        views: dict[int, list[np.ndarray]] = {}
        for i in np.lexsort((at, episodes)).tolist():  # a decoder goes on forward where two samples are of one video
            views[i] = self._views(episodes[i], at[i])
        made = []
        for i, (task, stretch, row, rng) in enumerate(zip(known, own, at, rngs, strict=True)):
            to_go = -1 if stretch.goal is None else max(stretch.goal - row, 0)
            cloned = to_go >= 0 or self.failures == "clone"
            text, to_go = task.target(self.mode, row, to_go, rng)
            sample = Sample(words[i], text, fast[i], task.at(row).text if self.say_subtask and cloned else None)
            images = [augment_view(image, rng) for image in views[i]] if self.augmented else views[i]
            sequence = processor.builder.sequence(sample, response=response and cloned, contrastive=contrastive)
            # Of what does not lead to the goal nothing is imitated.
            chunk, pad = (normalized[i], is_pad[i]) if cloned else (None, None)
            made.append(TrainingSample(sequence, images, chunk, pad, to_go, self._task_id(text), self.row_s))
        return made


def held_out_set(
    name: str, dataset: LeRobotDataset, index: DatasetIndex, processor: Processor, **options: Any
) -> list[RobotDataset]:
    """The episodes of split "heldout" that reached their goal, for evaluation during training; nothing where there are
    none."""
    episodes = np.array(dataset.episodes("heldout") if "heldout" in dataset.info.split_ranges else [], np.int64)
    own = index.stretches_of(episodes)
    reached = np.unique(index.episode_of(own[index.stretches["goal"][own] >= 0])).tolist()
    return [RobotDataset(name, dataset, index, processor, reached, **options)] if reached else []


class VqaDataset(OneByOne):
    """An image-text dataset (a `SampleSource`): words to answer, no action."""

    tasks: frozenset[int] = frozenset()

    def __init__(
        self, name: str, dataset: LlavaDataset, processor: Processor, shared: SharedFiles | None = None
    ) -> None:
        self.name, self.dataset, self.processor = name, dataset, processor
        self.shared = shared or SharedFiles()
        self.builder = ConversationBuilder(processor.tokenizer)

    def __len__(self) -> int:
        return len(self.dataset)

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        """Counted once for all processes of a run: the header of every image is read for it."""

        def fill(into: np.ndarray) -> None:
            for row in track(range(len(self)), total=len(self), what=f"measuring {self.name}"):
                into[row] = len(self._sequence(row, self.dataset.image_sizes(row)))

        name = f"lengths-{self.name}-{digest_value(self.dataset.digest)[-12:]}"
        return self.shared.array(name, (len(self),), np.int32, fill)

    def item(self, row: int, rng: np.random.Generator, *, response: bool, contrastive: bool) -> TrainingSample:
        images = self.dataset[row].images
        sized = [resize_for_model(image[None], self.processor.view_size(*image.shape[:2]))[0] for image in images]
        return TrainingSample(self._sequence(row, [image.shape[:2] for image in images]), sized)

    def _sequence(self, row: int, sizes: Sequence[tuple[int, ...]]) -> TokenSequence:
        """The words of `row` around images of (height, width) pixels."""
        factor = self.processor.model.vision.patch_size * self.processor.model.vision.merge_size
        views = []
        for height, width in sizes:
            seen = self.processor.view_size(height, width)
            rows, columns = (seen, seen) if isinstance(seen, int) else seen
            views.append(ImageTokens("", rows // factor, columns // factor))
        return self.builder.sequence(self.dataset.records[row].turns, views)
