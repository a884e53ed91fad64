"""A LeRobot dataset read into memory as the arrays that training draws from. Decodes each video once.

It does not know losses or models; memory is rows * cameras * image_size^2 * 3 bytes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from prts_core.contract import require_equal
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.processor import Processor
from prts_core.progress import track
from prts_core.training.batch import TrainingSet, chunk_windows


def success_rows(dataset: LeRobotDataset, episode: int) -> int:
    """The row at which an episode reached its goal: the first `next.success`, else its last row."""
    last = dataset.length(episode) - 1
    if "next.success" not in dataset.info.features:
        return last
    flags = np.flatnonzero(dataset.columns(episode, ["next.success"])["next.success"])
    return int(flags[0]) if len(flags) else last


def load_training_set(name: str, dataset: LeRobotDataset, processor: Processor, threads: int = 2) -> TrainingSet:
    """All rows of the split `train`. The dataset's contract must be the processor's."""
    require_equal(dataset.contract, processor.contract.contract, left_name=f"dataset {name}", right_name="policy")
    episodes = dataset.episodes("train")
    size, length = processor.model.image_size, processor.contract.chunk_length
    cameras = [camera.key for camera in processor.contract.contract.cameras]

    def pictures(episode: int) -> np.ndarray:
        return np.stack([dataset.frames(episode, camera, size=size) for camera in cameras], axis=1)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        images = list(track(pool.map(pictures, episodes), total=len(episodes), what=f"decoding {name}"))
    states, chunks, pads, to_go, instructions = [], [], [], [], []
    for episode in episodes:
        actions = processor.normalize_actions(dataset.actions(episode))
        windows, is_pad = chunk_windows(actions, length)
        states.append(processor.state_bins(dataset.states(episode)))
        chunks.append(windows)
        pads.append(is_pad)
        to_go.append(np.clip(success_rows(dataset, episode) - np.arange(len(actions)), 0, None))
        instructions += [dataset.instruction(episode)] * len(actions)
    all_chunks = np.concatenate(chunks)
    vision = processor.model.vision
    return TrainingSet(
        name, processor.builder, vision.patch_size, vision.merge_size, np.concatenate(images), np.concatenate(states),
        all_chunks, np.concatenate(pads), [tuple(t) for t in processor.fast.encode_many(all_chunks)], instructions,
        np.concatenate(to_go),
    )  # fmt: skip
