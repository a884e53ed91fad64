"""Training draws the same batches from pictures in memory and from video, with any number of loader processes."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from prts_core.training.batch import Batch, BatchSource
from prts_core.training.datasets import RobotDataset
from tests.fixtures.reaching import reaching_processor, write_reaching


def batches(data: RobotDataset, tiny, cursor: dict | None = None, workers: int = 0, count: int = 4) -> list[Batch]:
    source = BatchSource(
        [data],
        [1.0],
        6,
        5,
        chunk_length=tiny.chunk_length,
        max_action_dim=tiny.max_action_dim,
        patch=tiny.vision.patch_size,
        merge=tiny.vision.merge_size,
        response=True,
        contrastive=0,
    )
    made = source.batches(cursor or source.start(), workers)
    return list(islice(made, count))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(
        a.ids == b.ids
        and a.cursor == b.cursor
        and torch.equal(a.actions, b.actions)
        and torch.equal(a.tokens.pixels, b.tokens.pixels)
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def sets(tmp_path, tiny, tokenizer, fast) -> tuple[RobotDataset, RobotDataset]:
    dataset = write_reaching(tmp_path, per_goal=2)
    processor = reaching_processor(tmp_path, tiny, tokenizer, fast)
    kept, read = (RobotDataset("reaching", dataset, processor, [3, 0, 2], memory_gib=gib) for gib in (4.0, 0.0))
    assert kept.frames[0].kept is not None and read.frames[0].kept is None
    return kept, read


def test_pictures_in_memory_and_from_video_are_the_same(sets, tiny) -> None:
    kept, read = sets
    for row in (0, len(kept) - 1, 3, 4, 5, len(kept) // 2):
        assert np.array_equal(kept.frames[0][row], read.frames[0][row])
    assert same(batches(kept, tiny), batches(read, tiny))


def test_resume_reads_on_at_the_cursor(sets, tiny) -> None:
    read = sets[1]
    whole = batches(read, tiny, count=5)
    assert same(batches(read, tiny, whole[1].cursor, count=3), whole[2:])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_make_the_same_batches(sets, tiny, workers: int) -> None:
    kept, read = sets
    expected = batches(read, tiny)  # warm decoders are what a fork then copies
    assert same(batches(read, tiny, workers=workers), expected) and same(batches(kept, tiny), expected)
