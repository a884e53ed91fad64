"""Checkpoint folders: whole or not there, the newest whole one is found, what does not fit is named."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from concurrent.futures import wait
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.config.identity import identity
from prts_core.config.train import TrainConfig
from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.tensors import load_weights, save_tensors
from prts_core.training import checkpoint as disk
from prts_core.training.parallel import ParallelContext

CONFIG = TrainConfig()
ALONE = ParallelContext()


def shards() -> dict[str, disk.FlatShard]:
    return {
        "model/a": disk.FlatShard(torch.arange(300.0), 0, 300),
        "ema/a": disk.FlatShard(torch.ones(7), 3, 10),
        "ema/b": disk.FlatShard(torch.zeros(5), 0, 5, owner=False),
    }


def save(root: Path, step: int, keep: int = 2) -> Path:
    saver = disk.Saver(root, ALONE, keep)
    try:
        saver.start(disk.State(step, {"sample": 6 * step}, 7, identity(CONFIG)), shards())
        saver.staged()
        saver.wait()
    finally:
        saver.close()
    return root / f"checkpoint-{step}"


def test_a_checkpoint_comes_back_and_old_ones_go(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    newest = disk.newest(tmp_path)
    state = disk.read_state(newest)
    assert (state.step, state.cursor, state.seed) == (6, {"sample": 36}, 7)
    files = disk.ShardFiles(newest)
    assert files.runs.keys() == {"model/a", "ema/a"}, "each run is written by the process that owns it"
    assert torch.equal(files.whole("model/a", (30, 10)), torch.arange(300.0).reshape(30, 10))
    disk.check_same_run(state, CONFIG, 7, newest)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=4), st.lists(st.integers(0, 40), max_size=4))
def test_any_split_of_a_tensor_is_read_into_any_other(size, written, read):
    """Written in runs by several processes, read in other runs: the elements are the same."""
    whole = torch.arange(float(size))

    def runs(cuts):
        bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
        return [(low, high) for low, high in pairwise(bounds)]

    with tempfile.TemporaryDirectory() as folder:
        for number, (low, high) in enumerate(runs(written)):
            path = Path(folder) / f"{number}.safetensors"
            save_tensors(path, {"x": whole[low:high]}, {disk.STARTS: json.dumps({"x": low})})
        files = disk.ShardFiles(Path(folder))
        for low, high in runs(read):
            shard = disk.FlatShard(torch.full((high - low,), -1.0), low, size)
            files.fill({"x": shard})
            assert torch.equal(shard.values, whole[low:high])


def test_what_a_checkpoint_lacks_is_named_and_the_cure_is_said(tmp_path):
    files = disk.ShardFiles(save(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"ema/a.*7 of 10 elements") as caught:
        files.fill({"ema/a": disk.FlatShard(torch.zeros(10), 0, 10)})
    assert "train.freeze" in str(caught.value)
    with pytest.raises(CheckpointError, match="0 of 2"):
        files.fill({"model/new": disk.FlatShard(torch.zeros(2), 0, 2)})


def test_training_goes_on_while_a_checkpoint_is_written_but_not_before_it_is_copied(tmp_path, monkeypatch):
    """What is changed after `staged` is not in the files, and `staged` returns while the disk still works."""
    reached, go_on = threading.Event(), threading.Event()
    stock = disk.save_tensors

    def slow(*given):
        reached.set()
        assert go_on.wait(20)
        stock(*given)

    monkeypatch.setattr(disk, "save_tensors", slow)
    weights, saver = torch.ones(4), disk.Saver(tmp_path, ALONE)
    saver.start(disk.State(1, {}), {"model/a": disk.FlatShard(weights, 0, 4)})
    saver.staged()
    weights.zero_()
    assert reached.wait(20) and disk.newest(tmp_path) is None
    go_on.set()
    saver.start(disk.State(2, {}), {"model/a": disk.FlatShard(weights, 0, 4)})  # after the first one is on the disk
    saver.wait()
    saver.close()
    first, second = (disk.ShardFiles(tmp_path / f"checkpoint-{n}").whole("model/a", (4,)) for n in (1, 2))
    assert torch.equal(first, torch.ones(4)) and torch.equal(second, torch.zeros(4))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "state.json").unlink(),
        lambda f: (f / "state.json").write_text('{"format": 2'),
        lambda f: next(f.glob("*.safetensors")).unlink(),
        lambda f: os.truncate(next(f.glob("*.safetensors")), 20),
        lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('"step": 4', '"step": "4"')),
        lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('"gamma": 0.9', '"gamma": 0.8')),
    ],
    ids=["no state", "torn state", "no weights", "torn weights", "bad step", "edited configuration"],
)
def test_a_torn_one_is_passed_over_with_a_note(tmp_path, caplog, damage):
    save(tmp_path, 2)
    damage(save(tmp_path, 4))
    with caplog.at_level(logging.WARNING):
        assert disk.newest(tmp_path).name == "checkpoint-2"
    assert "checkpoint-4 is ignored" in caplog.text
    save(tmp_path, 4)
    assert disk.newest(tmp_path).name == "checkpoint-4", "and is replaced when the run comes there again"


def test_a_cut_save_leaves_the_last_one(tmp_path, monkeypatch):
    save(tmp_path, 2)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prts_core.io.tensors.os.fsync", full)
    with pytest.raises(StageError, match="The disk is full"):
        save(tmp_path, 4)
    monkeypatch.undo()
    assert disk.newest(tmp_path).name == "checkpoint-2"
    save(tmp_path, 6)
    assert not list(tmp_path.glob(".*")), "what the cut left is swept"


def test_a_checkpoint_that_does_not_reach_the_disk_is_told_before_the_weights_change_again(
    tmp_path, monkeypatch, caplog
):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prts_core.io.tensors.os.fsync", full)
    saver = disk.Saver(tmp_path, ALONE)
    saver.start(disk.State(1, {}), shards())
    wait([saver._work])
    with pytest.raises(StageError, match="The disk is full"):
        saver.staged()
    saver.start(disk.State(2, {}), shards())
    with caplog.at_level(logging.WARNING):
        saver.close()  # on the way out for another reason
    assert "did not reach the disk" in caplog.text


def test_names_that_only_look_like_checkpoints_are_none(tmp_path):
    (tmp_path / "checkpoint-final-9").mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert disk.newest(tmp_path) is None and disk.newest(tmp_path / "absent") is None


def test_another_recipe_or_seed_is_told_field_by_field(tmp_path):
    folder = save(tmp_path, 2)
    state = disk.read_state(folder)
    disk.check_same_run(state, TrainConfig(log_every=1, workers=2, engine="zero2", threads=1), 7, folder)
    with pytest.raises(CheckpointError, match="early_fraction"):  # `early/` is part of the output
        disk.check_same_run(state, TrainConfig(early_fraction=0.1), 7, folder)
    with pytest.raises(CheckpointError, match=r"gamma: 0\.9 then, 0\.99 now; seed: 7 then, 8 now"):
        disk.check_same_run(state, TrainConfig(gamma=0.99), 8, folder)


def test_wrong_weights_are_named(model):
    tensors = dict(model.state_dict())
    tensors.pop("crl_logit_scale")
    tensors["stranger"] = torch.zeros(1)
    tensors["dit_action_head.action_out_proj.bias"] = torch.zeros(3)
    with pytest.raises(
        CheckpointError, match=r"missing 1: crl_logit_scale; extra 1: stranger; mis-shaped 1: dit_action_head"
    ):
        load_weights(model, tensors, "x")


def test_state_is_plain_json(tmp_path):
    about = json.loads((save(tmp_path, 2) / "state.json").read_text())
    assert about["config"]["gamma"] == 0.9 and "log_every" not in about["config"] and about["files"]
