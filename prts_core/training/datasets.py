"""A LeRobot dataset, or an image-text one, as the trainer draws from it. Words and numbers are read once; images are
decoded into memory once where they fit, and when asked for where they do not.

It does not know losses or models; what a sample says and how it is normalised is the processor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from prts_core.config.subtask_mode import SubtaskMode
from prts_core.contract import require_equal
from prts_core.data.ahead import run_parallel
from prts_core.data.augment import augment_view
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
from prts_core.training.batch import TrainingSample, chunk_windows, steps_to_go
from prts_core.training.windows import FrameReader

MEMORY_GIB = 4.0  # images of one dataset that are kept decoded; beyond it they are read when drawn, by FrameReader


def success_rows(dataset: LeRobotDataset, episode: int) -> int:
    """The row at which an episode reached its goal: the first `next.success`, else its last row."""
    last = dataset.length(episode) - 1
    if "next.success" not in dataset.info.features:
        return last
    flags = np.flatnonzero(dataset.columns(episode, ["next.success"])["next.success"])
    return int(flags[0]) if len(flags) else last


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
    """Every row of some episodes as a sample (a `SampleSource`). train_subtask: see prts_core.data.subtasks.

    say_subtask: the subtask is what the policy says before it acts (stage subtask), instead of what it is told.
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
        self.processor, self.episodes = processor, tuple(episodes)
        self.augmented, self.say_subtask = augmented, say_subtask
        self.mode = SubtaskMode.parse(train_subtask, dataset.root)
        self._read_numbers(dataset)
        self._read_images(dataset, threads, memory_gib)

    def _read_numbers(self, dataset: LeRobotDataset) -> None:
        processor, states, chunks, pads = self.processor, [], [], []
        self.subtasks = [Subtasks.of_episode(dataset.rows[e], dataset.root) for e in self.episodes]
        self.of_row: list[tuple[int, int]] = []  # position of the episode in `episodes`, row in it
        self.fast: list[list[int]] = []
        to_go = []
        for position, episode in enumerate(self.episodes):
            actions = dataset.actions(episode)
            windows, is_pad = chunk_windows(actions, processor.contract.chunk_length)
            own = dataset.states(episode)
            self.fast += processor.fast_tokens(windows, own)
            states.append(processor.state_bins(own))
            chunks.append(processor.normalize_actions(windows, own))
            pads.append(is_pad)
            to_go.append(steps_to_go(success_rows(dataset, episode), len(actions)))
            self.of_row += [(position, row) for row in range(len(actions))]
        self.chunks, self.is_pad, self.steps_to_go = np.concatenate(chunks), np.concatenate(pads), np.concatenate(to_go)
        self.states = processor.builder.encode_states(np.concatenate(states))

    def _read_images(self, dataset: LeRobotDataset, threads: int, memory_gib: float) -> None:
        sizes = self.processor.view_sizes
        pixels = sum(s * s if isinstance(s, int) else s[0] * s[1] for s in sizes.values())
        keep = len(self) * pixels * 3 <= memory_gib * 2**30
        reader = FrameReader(dataset)
        self.frames = [CameraFrames(reader, key, self.episodes, size, keep) for key, size in sizes.items()]
        if keep:

            def decode(position: int) -> None:
                for camera in self.frames:
                    camera.keep(position)

            run_parallel(decode, range(len(self.episodes)), threads, f"decoding {self.name}")

    def __len__(self) -> int:
        return len(self.chunks)

    @cached_property
    def tasks(self) -> frozenset[int]:
        told = sentences(self.subtasks, self.mode)
        return frozenset(prompt.task_id(text, self.processor.compat) for text in told)

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        builder, told = self.processor.builder, []
        shown = SubtaskMode("cumulate" if self.mode.kind == "cumulate" else "replace")
        for position, row in self.of_row:
            task = self.subtasks[position]
            texts = {task.instruction}
            if self.mode.kind != "off":  # which one is drawn is the sample's own matter; the longer one is room enough
                texts.add(task.target(shown, row, 0)[0])
            told.append(max(len(builder.instruction(text)) for text in texts))
        counts = [np.array([len(tokens) for tokens in part]) for part in (self.states, self.fast)]
        return builder.lengths(counts[0], counts[1], np.array(told), response=response, contrastive=contrastive)

    def item(self, row: int, rng: np.random.Generator, *, response: bool, contrastive: bool) -> TrainingSample:
        position, at = self.of_row[row]
        task = self.subtasks[position]
        text, to_go = task.target(self.mode, at, int(self.steps_to_go[row]), rng)
        sample = Sample(self.states[row], text, self.fast[row], task.at(at).text if self.say_subtask else None)
        images = [camera[row] for camera in self.frames]
        if self.augmented:
            images = [augment_view(image, rng) for image in images]
        sequence = self.processor.builder.sequence(sample, response=response, contrastive=contrastive)
        task_id = prompt.task_id(text, self.processor.compat)
        return TrainingSample(sequence, images, self.chunks[row], self.is_pad[row], to_go, task_id)


def held_out_set(name: str, dataset: LeRobotDataset, processor: Processor, **options: Any) -> list[RobotDataset]:
    """The episodes of split "heldout" for evaluation during training; nothing where the dataset has none."""
    episodes = dataset.episodes("heldout") if "heldout" in dataset.info.split_ranges else []
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
