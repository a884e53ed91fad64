"""The loop: a killed and resumed run is bit-identical to an uninterrupted one; NaN stops it; batches are pure
functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prts_core.errors import CheckpointError, StageError
from prts_core.models.prts import PrtsModel
from prts_core.tensors import load_weights, save_tensors
from prts_core.text import prompt
from prts_core.training.batch import BatchSource, TrainingSet, chunk_windows, pad_actions, task_id
from prts_core.training.config import LossWeights, TrainConfig
from prts_core.training.trainer import Trainer, learning_rate

SENTENCES = ["open the faucet", "close the faucet", "press the button"]
CONFIG = TrainConfig(
    steps=6, batch_size=6, warmup_steps=2, checkpoint_every=3, log_every=1, weights=LossWeights(1.0, 1.0, 0.5)
)


@pytest.fixture
def data(tiny, builder, fast) -> TrainingSet:
    rng = np.random.default_rng(0)
    rows = 24
    chunks = rng.uniform(-1, 1, (rows, 4, 3)).astype(np.float32)
    return TrainingSet(
        "toy",
        builder,
        tiny.vision.patch_size,
        tiny.vision.merge_size,
        rng.integers(0, 256, (rows, 2, 32, 32, 3), dtype=np.uint8),
        rng.integers(0, 1001, (rows, 3)),
        chunks,
        np.zeros((rows, 4), bool),
        [tuple(t) for t in fast.encode_many(chunks)],
        [SENTENCES[i % 3] for i in range(rows)],
        rng.integers(0, 9, rows),
    )


def make(tiny, tokenizer, data, config=CONFIG) -> Trainer:
    torch.manual_seed(0)
    model = PrtsModel(tiny, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    batches = BatchSource([data], [1.0], config.batch_size, 7, max_action_dim=8, response=True, contrastive=True)
    return Trainer(model, batches, config, seed=7)


class Killed(BaseException):
    pass


def test_resumed_run_is_bit_identical(tmp_path, tiny, tokenizer, data):
    straight: dict[int, float] = {}
    whole = make(tiny, tokenizer, data)
    whole.fit(tmp_path / "whole.safetensors", lambda step, m: straight.__setitem__(step, m["loss"]))

    resumed: dict[int, float] = {}

    def dies(step, metrics):
        resumed[step] = metrics["loss"]
        if step == 4:  # after the checkpoint at 3, inside the next stretch
            raise Killed

    with pytest.raises(Killed):
        make(tiny, tokenizer, data).fit(tmp_path / "cut.safetensors", dies)
    again = make(tiny, tokenizer, data)
    again.fit(tmp_path / "cut.safetensors", lambda step, m: resumed.__setitem__(step, m["loss"]))
    assert resumed == straight
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values(), again.average.values(), strict=True))


def test_it_learns(tmp_path, tiny, tokenizer, data):
    config = replace(CONFIG, steps=40, learning_rate=3e-3, checkpoint_every=1000)
    losses: list[float] = []
    make(tiny, tokenizer, data, config).fit(tmp_path / "c.safetensors", lambda step, m: losses.append(m["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_nan_stops_with_the_rows_named(tmp_path, tiny, tokenizer, data):
    data.chunks[:] = np.nan
    with pytest.raises(StageError, match=r"not finite.*rows \["):
        make(tiny, tokenizer, data).fit(tmp_path / "c.safetensors", lambda step, m: None)
    assert not (tmp_path / "c.safetensors").exists()


def test_nan_between_two_logs_is_never_saved(tmp_path, tiny, tokenizer, data):
    trainer = make(tiny, tokenizer, data, replace(CONFIG, log_every=1000))
    clean = trainer.batches

    def poisoned(step):
        batch = clean(step)
        if step >= 1:
            batch.actions[:] = float("nan")
        return batch

    trainer.batches = poisoned
    with pytest.raises(StageError, match="not finite"):
        trainer.fit(tmp_path / "c.safetensors", lambda step, m: None)
    assert not (tmp_path / "c.safetensors").exists()


def test_batches_depend_on_seed_and_step_only(data):
    source = BatchSource([data], [1.0], 6, 7, max_action_dim=8, response=False, contrastive=True)
    assert np.array_equal(source(3).rows, source(3).rows)
    assert not np.array_equal(source(3).rows, source(4).rows)
    halves = [
        BatchSource([data], [1.0], 6, 7, max_action_dim=8, response=False, contrastive=True, rank=r, world=2)
        for r in (0, 1)
    ]
    assert sorted(np.concatenate([h(3).rows for h in halves])) == sorted(source(3).rows)


def test_wrong_weights_are_named(tiny, tokenizer, data, tmp_path):
    model = make(tiny, tokenizer, data).model
    tensors = dict(model.state_dict())
    tensors.pop("crl_logit_scale")
    tensors["stranger"] = torch.zeros(1)
    tensors["dit_action_head.action_out_proj.bias"] = torch.zeros(3)
    with pytest.raises(
        CheckpointError, match=r"missing 1: crl_logit_scale; extra 1: stranger; mis-shaped 1: dit_action_head"
    ):
        load_weights(model, tensors, "x")


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr("prts_core.tensors.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        save_tensors(path, {"a": torch.zeros(9)})
    assert path.read_bytes() == before


def test_windows_clamp_and_flag():
    windows, is_pad = chunk_windows(np.arange(3, dtype=np.float32)[:, None], 2)
    assert windows[..., 0].tolist() == [[0, 1], [1, 2], [2, 2]]
    assert is_pad.tolist() == [[False, False], [False, False], [False, True]]


def test_padding_and_ids():
    padded, mask = pad_actions(torch.ones(1, 2, 3), 5)
    assert padded[0, 0].tolist() == [1, 1, 1, 0, 0] and mask[0, 1].tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="raise max_action_dim"):
        pad_actions(torch.ones(1, 2, 6), 5)
    assert task_id(" Open the faucet") == task_id("open the faucet") != task_id("close the faucet")


def test_schedule_warms_up_and_comes_down():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(config, s) for s in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and max(rates) == pytest.approx(1.0)
        and rates[-1] == pytest.approx(0.1, abs=0.01)
    )
