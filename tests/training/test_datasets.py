"""Training draws the same batches from pictures in memory and from video, with any number of loader processes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prts_core.data.index import DatasetIndex
from prts_core.data.llava import LlavaDataset
from prts_core.io.errors import StageError
from prts_core.stages import pretrain
from prts_core.text import prompt
from prts_core.text.sequence import Sample
from prts_core.training.batch import Batch, BatchSource, chunk_windows
from prts_core.training.datasets import RobotDataset, VqaDataset
from prts_core.training.shared_files import SharedFiles
from tests.data.test_index import with_subtasks
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
    index, folder = DatasetIndex.of(dataset), tmp_path / "work"
    kept, read = (
        RobotDataset("reaching", dataset, index, processor, [3, 0, 2], shared=shared)
        for shared in (SharedFiles(folder), SharedFiles(folder, left=1000))
    )
    assert len(list(folder.glob("pictures-*.npy"))) == 1
    return kept, read


def test_pictures_in_memory_and_from_video_are_the_same(sets, tiny) -> None:
    kept, read = sets
    for row in (0, len(kept) - 1, 3, 4, 5, len(kept) // 2):
        assert np.array_equal(kept.pictures(row), read.pictures(row))
    with pytest.raises(IndexError):
        kept.pictures(len(kept))
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


def test_what_is_counted_once_is_mapped_by_all(sets, tmp_path, monkeypatch) -> None:
    kept, read = sets
    counted = kept.lengths(response=True, contrastive=False)
    monkeypatch.setattr(RobotDataset, "_count", None)
    again = read.lengths(response=True, contrastive=False)
    assert again.dtype == np.uint16 and not again.flags.writeable and np.array_equal(counted, again)
    assert len(list((tmp_path / "work").glob("lengths-*.npy"))) == 1


def test_the_room_for_pictures_is_one_for_all_sets_of_a_run() -> None:
    shared = SharedFiles(left=100)
    assert [shared.claim(size) for size in (60, 60, 40, 1)] == [True, False, True, False]


def test_a_shared_array_is_made_by_one_process(tmp_path) -> None:
    """The others wait; what a killed one left is cleared away."""
    (tmp_path / ".squares%5B1%5D.npy.partial-7").write_bytes(b"cut")
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        found = pool.map(_squares, [tmp_path] * 3)
    assert found == [sum(i * i for i in range(50))] * 3
    assert (tmp_path / "made").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "squares%5B1%5D.lock", "squares%5B1%5D.npy"]


def _squares(folder: Path) -> int:
    def fill(into: np.ndarray) -> None:
        with (folder / "made").open("a") as file:
            file.write("x")
        time.sleep(0.05)
        into[:] = np.arange(50) ** 2

    return int(SharedFiles(folder).array("squares[1]", (50,), np.int64, fill).sum())


def test_a_name_with_a_slash_stays_in_the_folder(tmp_path) -> None:
    for name in ("a/b", "a__b", "../c"):
        SharedFiles(tmp_path / "work").array(name, (2,), np.int64, lambda into: None)
    assert len(list((tmp_path / "work").iterdir())) == 6 and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StageError, match=r"(?i)full|space"):
        SharedFiles(tmp_path).array("squares", (50,), np.int64, lambda into: None)
    assert [path.name for path in tmp_path.iterdir()] == ["squares.lock"]


def test_fast_is_made_only_where_a_loss_reads_it(sets, monkeypatch) -> None:
    kept, _ = sets
    monkeypatch.setattr(type(kept.processor), "fast_tokens", None)
    (made,) = kept.items([3], [np.random.default_rng(0)], response=False, contrastive=False)
    assert made.chunk is not None
    with pytest.raises(TypeError):
        kept.items([3], [np.random.default_rng(0)], response=True, contrastive=False)


@pytest.mark.parametrize("mode", [False, True, "mixture:0.5", "cumulate"])
def test_samples_are_those_of_the_whole_episodes(tmp_path, tiny, tokenizer, fast, mode) -> None:
    """Chunks, states and tokens made for a batch are those that are made for all rows of an episode at once."""
    dataset = with_subtasks(write_reaching(tmp_path, per_goal=2).root)
    processor = reaching_processor(tmp_path, tiny, tokenizer, fast)
    rows = RobotDataset("reaching", dataset, DatasetIndex.of(dataset), processor, [3, 1], train_subtask=mode)
    made = rows.items(
        range(len(rows)), [np.random.default_rng(i) for i in range(len(rows))], response=True, contrastive=True
    )
    at = 0
    for episode in (3, 1):
        states, task = dataset.states(episode), rows.index.subtasks(episode)
        windows, pads = chunk_windows(dataset.actions(episode), tiny.chunk_length)
        chunks, tokens = processor.normalize_actions(windows, states), processor.fast_tokens(windows, states)
        words = processor.builder.encode_states(processor.state_bins(states))
        for row in range(len(states)):
            one, last = made[at], len(states) - 1
            text, to_go = task.target(rows.mode, row, last - row, np.random.default_rng(at))
            sample = Sample(words[row], text, tokens[row])
            wanted = processor.builder.sequence(sample, response=True, contrastive=True)
            assert np.array_equal(one.sequence.ids, wanted.ids) and one.steps_to_go == to_go
            assert one.chunk.tobytes() == chunks[row].tobytes() and np.array_equal(one.is_pad, pads[row])
            at += 1
    assert at == len(rows) == len(made)
    texts = {prompt.task_id(text) for text in rows._told()}
    assert {one.task_id for one in made} <= texts == rows.tasks


def test_fast_is_fitted_on_all_windows_of_a_small_set_and_on_some_of_a_large_one(tmp_path, monkeypatch) -> None:
    dataset = write_reaching(tmp_path, per_goal=3)
    windows = {e: chunk_windows(dataset.actions(e), 4)[0] for e in dataset.episodes()}
    actions, states = pretrain.some_windows(dataset, 4, 7)
    assert np.array_equal(actions, np.concatenate(list(windows.values())))
    assert np.array_equal(states, np.concatenate([dataset.states(e) for e in windows]))
    monkeypatch.setattr(pretrain, "FAST_WINDOWS", 30)
    monkeypatch.setattr(pretrain, "FAST_EPISODES", 5)
    some, own = pretrain.some_windows(dataset, 4, 7)
    assert len(some) == len(own) == 30
    every = {one.tobytes() for part in windows.values() for one in part}
    assert all(one.tobytes() in every for one in some)
    assert np.array_equal(some, pretrain.some_windows(dataset, 4, 7)[0])
    assert not np.array_equal(some, pretrain.some_windows(dataset, 4, 8)[0])


def test_headers_of_pictures_are_read_once_for_all_processes(tmp_path, tiny, tokenizer, fast, monkeypatch) -> None:
    Image.new("RGB", (48, 40), (200, 30, 30)).save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "captions.jsonl").write_text("\n".join([json.dumps({"image": "red.png", "conversations": turns})] * 3))
    processor = reaching_processor(tmp_path, tiny, tokenizer, fast)
    made = [
        VqaDataset(
            "captions", LlavaDataset.open(tmp_path / "captions.jsonl"), processor, SharedFiles(tmp_path / "work")
        )
        for _ in range(2)
    ]
    counted = made[0].lengths(response=True, contrastive=False)
    monkeypatch.setattr(LlavaDataset, "image_sizes", None)
    assert np.array_equal(made[1].lengths(response=True, contrastive=False), counted)
    (sample,) = made[1].items([1], [np.random.default_rng(0)], response=True, contrastive=False)
    assert len(sample.sequence) == counted[1]
