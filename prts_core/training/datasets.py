"""A LeRobot dataset, or an image-text one, as the trainer draws from it. Words and numbers are read once; images are
decoded into memory once where they fit, and when asked for where they do not.

What a sample says and how it is normalised is the processor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from prts_core.config.subtask_mode import SubtaskMode
from prts_core.config.train import Failures
from prts_core.contract import require_equal
from prts_core.data.ahead import run_parallel
from prts_core.data.augment import augment_view
from prts_core.data.goals import SUCCESS, stretches
from prts_core.data.images import resize_for_model
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.seal import check_sizes
from prts_core.data.llava import LlavaDataset
from prts_core.data.subtasks import Subtasks, sentences
from prts_core.io.errors import DataError
from prts_core.io.progress import track
from prts_core.policy.processor import Processor
from prts_core.text import prompt
from prts_core.text.sequence import ConversationBuilder, ImageTokens, Sample, TokenSequence
from prts_core.training.batch import TrainingSample, chunk_windows
from prts_core.training.windows import FrameReader

MEMORY_GIB = 4.0  # images of one dataset that are kept decoded; beyond it they are read when drawn, by FrameReader


class CameraFrames:
    """One camera over the rows of some episodes, at the model's size."""

    def __init__(
        self, reader: FrameReader, camera: str, episodes: Sequence[int], size: int | tuple[int, int], keep: bool
    ) -> None:
        self.reader, self.camera, self.episodes, self.size = reader, camera, tuple(episodes), size
        self.first = np.cumsum([0, *(reader.dataset.length(e) for e in episodes)])
        self.kept: np.ndarray | None = None
        if keep:
            height, width = (size, size) if isinstance(size, int) else size
            self.kept = np.empty((int(self.first[-1]), height, width, 3), np.uint8)

    def keep(self, position: int) -> None:
        """Decode the episode at `position` of the list into memory."""
        if self.kept is not None:
            frames = self.reader.dataset.frames(self.episodes[position], self.camera, size=self.size)
            self.kept[self.first[position] : self.first[position + 1]] = frames

    def __getitem__(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        if self.kept is not None:
            return self.kept[row]
        position = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.reader.rgb(self.episodes[position], self.camera, row - int(self.first[position]), self.size)


class RobotDataset:
    """Rows of some episodes as samples (a `SampleSource`). train_subtask: see prts_core.data.subtasks.

    say_subtask: the subtask is what the policy says before it acts (stage subtask), instead of what it is told.
    failures: what becomes of rows whose goal was not reached (`TrainConfig.failures`).
    """

    def __init__(
        self,
        name: str,
        dataset: LeRobotDataset,
        processor: Processor,
        episodes: Sequence[int],
        *,
        augmented: bool = False,
        train_subtask: bool | str | None = None,
        say_subtask: bool = False,
        failures: Failures = "leave_out",
        threads: int = 2,
        memory_gib: float = MEMORY_GIB,
    ) -> None:
        require_equal(dataset.contract, processor.contract.contract, left_name=f"dataset {name}", right_name="policy")
        check_sizes(dataset.root)  # digests are read by `prts validate`; a stat a file costs nothing here
        if not episodes:
            raise DataError(
                "A dataset has no episodes to train on",
                file=dataset.root,
                field="split train",
                found=0,
                expected="at least one episode",
                cure="look at splits in meta/info.json",
            )
        self.name = name.replace("__", "/")  # metrics say the repo_id, whose slash no partition name can hold
        known = {episode: Subtasks.read(dataset, episode) for episode in episodes}
        reached = [e for e in episodes if any(stretch.goal is not None for stretch in known[e].stretches)]
        if failures == "leave_out" and not reached:
            raise DataError(
                "No episode reached its goal",
                file=dataset.root,
                field=SUCCESS,
                found=f"never true in {len(episodes)} episodes",
                expected="at least one that succeeds; a dataset without this column is taken to succeed",
                cure="look at how success was recorded, or say train.failures=negatives or clone",
            )
        self.processor, self.episodes = processor, tuple(reached if failures == "leave_out" else episodes)
        self.augmented, self.say_subtask, self.failures = augmented, say_subtask, failures
        self.row_s = 1.0 / dataset.fps
        self.mode = SubtaskMode.parse(train_subtask, dataset.root)
        self.subtasks = [known[episode] for episode in self.episodes]
        self._read_numbers(dataset)
        self._read_images(dataset, threads, memory_gib)

    def _read_numbers(self, dataset: LeRobotDataset) -> None:
        processor, states, chunks, pads = self.processor, [], [], []
        self.of_row: list[tuple[int, int]] = []  # position of the episode in `episodes`, row in it
        self.fast: list[list[int]] = []
        to_go = []
        for position, episode in enumerate(self.episodes):
            actions = dataset.actions(episode)
            # A chunk ends where its instruction does: what comes next was done for another one, or failed.
            parts = [
                chunk_windows(actions[one.start : one.end], processor.contract.chunk_length)
                for one in self.subtasks[position].stretches
            ]
            windows, is_pad = (np.concatenate(part) for part in zip(*parts, strict=True))
            own = dataset.states(episode)
            self.fast += processor.fast_tokens(windows, own)
            states.append(processor.state_bins(own))
            chunks.append(processor.normalize_actions(windows, own))
            pads.append(is_pad)
            to_go += [stretch.steps_to_go() for stretch in self.subtasks[position].stretches]
            self.of_row += [(position, row) for row in range(len(actions))]
        self.chunks, self.is_pad, self.steps_to_go = np.concatenate(chunks), np.concatenate(pads), np.concatenate(to_go)
        self.states = processor.builder.encode_states(np.concatenate(states))
        left_out = (self.steps_to_go < 0) & (self.failures == "leave_out")
        self.rows = np.flatnonzero(~left_out)  # sample -> row of the episodes, all of them one after the other

    def _read_images(self, dataset: LeRobotDataset, threads: int, memory_gib: float) -> None:
        sizes = self.processor.view_sizes
        pixels = sum(s * s if isinstance(s, int) else s[0] * s[1] for s in sizes.values())
        keep = len(self.of_row) * pixels * 3 <= memory_gib * 2**30
        reader = FrameReader(dataset)
        self.frames = [CameraFrames(reader, key, self.episodes, size, keep) for key, size in sizes.items()]
        if keep:

            def decode(position: int) -> None:
                for camera in self.frames:
                    camera.keep(position)

            run_parallel(decode, range(len(self.episodes)), threads, f"decoding {self.name}")

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def tasks(self) -> frozenset[int]:
        told = sentences(map(self._taken, self.subtasks), self.mode)
        return frozenset(prompt.task_id(text, self.processor.compat) for text in told)

    def _taken(self, episode: Subtasks) -> Subtasks:
        """The episode with the stretches alone that samples are taken from."""
        taken = (one for one in episode.stretches if one.goal is not None or self.failures != "leave_out")
        return replace(episode, stretches=tuple(taken))

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        builder, told = self.processor.builder, []
        shown = SubtaskMode("cumulate" if self.mode.kind == "cumulate" else "replace")
        places = [self.of_row[at] for at in self.rows]
        for position, row in places:
            task = self.subtasks[position]
            texts = {task.stretch(row).instruction}
            if self.mode.kind != "off":  # which one is drawn is the sample's own matter; the longer one is room enough
                texts.add(task.target(shown, row, 0)[0])
            told.append(max(len(builder.instruction(text)) for text in texts))
        counts = [np.array([len(part[at]) for at in self.rows]) for part in (self.states, self.fast)]
        found = builder.lengths(counts[0], counts[1], np.array(told), response=response, contrastive=contrastive)
        if self.say_subtask:
            found = found + [builder.subtask_length(self.subtasks[p].at(row).text) for p, row in places]
        return found

    def item(self, row: int, rng: np.random.Generator, *, response: bool, contrastive: bool) -> TrainingSample:
        row = int(self.rows[row])
        position, at = self.of_row[row]
        task = self.subtasks[position]
        cloned = self.steps_to_go[row] >= 0 or self.failures == "clone"
        text, to_go = task.target(self.mode, at, int(self.steps_to_go[row]), rng)
        say = task.at(at).text if self.say_subtask and cloned else None
        sample = Sample(self.states[row], text, self.fast[row], say)
        images = [camera[row] for camera in self.frames]
        if self.augmented:
            images = [augment_view(image, rng) for image in images]
        sequence = self.processor.builder.sequence(sample, response=response and cloned, contrastive=contrastive)
        task_id = prompt.task_id(text, self.processor.compat)
        if not cloned:  # it shows what does not lead to the goal: nothing of it is imitated
            return TrainingSample(sequence, images, None, None, to_go, task_id, self.row_s)
        return TrainingSample(sequence, images, self.chunks[row], self.is_pad[row], to_go, task_id, self.row_s)


def held_out_set(name: str, dataset: LeRobotDataset, processor: Processor, **options: Any) -> list[RobotDataset]:
    """The episodes of split "heldout" that reached their goal, for evaluation during training; nothing where there are
    none."""
    episodes = dataset.episodes("heldout") if "heldout" in dataset.info.split_ranges else []
    episodes = [e for e in episodes if any(one.goal is not None for one in stretches(dataset, e))]
    return [RobotDataset(name, dataset, processor, episodes, **options)] if episodes else []


class VqaDataset:
    """An image-text dataset (a `SampleSource`): words to answer, no action."""

    tasks: frozenset[int] = frozenset()

    def __init__(self, name: str, dataset: LlavaDataset, processor: Processor) -> None:
        self.name, self.dataset, self.processor = name, dataset, processor
        self.builder = ConversationBuilder(processor.tokenizer)

    def __len__(self) -> int:
        return len(self.dataset)

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        made = track(range(len(self)), total=len(self), what=f"measuring {self.name}")
        return np.array([len(self._sequence(row, self.dataset.image_sizes(row))) for row in made], np.int64)

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
