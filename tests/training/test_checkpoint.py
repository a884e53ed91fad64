"""Checkpoint folders: whole or not there, the newest whole one is found, what does not fit is named."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from prts_core.config.identity import identity
from prts_core.config.train import TrainConfig
from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.tensors import load_weights
from prts_core.training import checkpoint as disk

CONFIG = TrainConfig()
PARTS = {"model": {"a": torch.ones(300), "b": torch.zeros(300)}, "average": {"a": torch.ones(3)}, "rng": {}}


def save(root: Path, step: int, **change) -> Path:
    state = disk.State(step, {"sample": 6 * step}, 7, 1, identity(CONFIG))
    return disk.save_checkpoint(root, state, PARTS, **change)


def test_a_checkpoint_comes_back_and_old_ones_go(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    newest = disk.newest(tmp_path)
    state = disk.read_state(newest)
    assert (state.step, state.cursor, state.seed) == (6, {"sample": 36}, 7)
    assert torch.equal(disk.load_part(newest, "model")["a"], torch.ones(300)) and not disk.load_part(newest, "rng")
    disk.check_same_run(state, CONFIG, 7, newest)


def test_parts_are_sharded(tmp_path):
    folder = save(tmp_path, 1, shard_mb=0)  # every tensor its own file
    assert (folder / "model.safetensors.index.json").exists()
    assert disk.load_part(folder, "model").keys() == {"a", "b"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "state.json").unlink(),
        lambda f: (f / "state.json").write_text('{"format": 1'),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: os.truncate(f / "average.safetensors", 20),
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


def test_names_that_only_look_like_checkpoints_are_none(tmp_path):
    (tmp_path / "checkpoint-final-9").mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert disk.newest(tmp_path) is None and disk.newest(tmp_path / "absent") is None


def test_another_recipe_or_seed_is_told_field_by_field(tmp_path):
    folder = save(tmp_path, 2)
    state = disk.read_state(folder)
    disk.check_same_run(state, TrainConfig(log_every=1, workers=2, deepspeed_stage=2, threads=1), 7, folder)
    with pytest.raises(CheckpointError, match="early_fraction"):  # `early/` is part of the output
        disk.check_same_run(state, TrainConfig(early_fraction=0.1), 7, folder)
    with pytest.raises(CheckpointError, match=r"gamma: 0\.9 then, 0\.99 now; seed: 7 then, 8 now"):
        disk.check_same_run(state, TrainConfig(gamma=0.99), 8, folder)


def test_optimiser_states_of_other_parameters_are_named(tmp_path):
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    sum(m(torch.ones(1, 2)).sum() for m in (first, second)).backward()
    optimizer.step()
    names = dict(zip([*first.parameters(), *second.parameters()], ["a.w", "a.b", "b.w", "b.b"], strict=True))
    tensors = disk.optimizer_tensors(optimizer, names)
    assert set(tensors) == {f"{n}.{k}" for n in names.values() for k in ("step", "exp_avg", "exp_avg_sq")}
    half = torch.optim.AdamW(first.parameters())
    with pytest.raises(CheckpointError, match=r"extra 2: \['b\.b', 'b\.w'\]"):
        disk.load_optimizer(half, names, tensors, tmp_path)
    disk.load_optimizer(half, names, {k: v for k, v in tensors.items() if k.startswith("a.")}, tmp_path)
    assert torch.equal(half.state[first.weight]["exp_avg"], optimizer.state[first.weight]["exp_avg"])


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
