"""The loop: a killed and resumed run is bit-identical to an uninterrupted one, to SIGKILL too; NaN stops it; a step in
micro-batches is the step of the big batch; precision and recomputation leave the losses what they are."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from prts_core.config.model import MotConfig
from prts_core.config.train import LossWeights, TrainConfig
from prts_core.io.errors import CheckpointError, StageError, Stopped
from prts_core.io.tensors import load_tensors, load_weights
from prts_core.training import trainer as loop
from prts_core.training.checkpoint import newest
from prts_core.training.meter import TIMES
from prts_core.training.optim import GROUPS, group_of
from prts_core.training.trainer import Trainer
from tests.training.runs import CONFIG, MODEL, batches, network, text_tokenizer, toy

HERE = Path(__file__).parent


def make(config: TrainConfig = CONFIG, model=MODEL, **change) -> Trainer:
    tokenizer = text_tokenizer()
    made = network(tokenizer, model)
    return Trainer(made, batches([toy(tokenizer)], config), config, 7, **change)


def losses_of(trainer: Trainer, root: Path) -> dict[int, float]:
    out: dict[int, float] = {}
    trainer.fit(root, lambda step, m: out.__setitem__(step, m["loss"]))
    return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, accumulate=2, precision="bf16"),
        replace(CONFIG, pack_length=300, pack_window=24, workers=2),
        replace(CONFIG, weights=LossWeights(fast=0.0, flow=1.0, contrastive=0.0)),
    ],
    ids=["plain", "accumulated bf16", "packed workers", "heads without gradient"],
)
def test_resumed_run_is_bit_identical(tmp_path, config):
    dropout = replace(MODEL, expert=MotConfig(hidden_size=32, num_heads=2, intermediate_size=48, dropout=0.3))
    whole = make(config, dropout)
    straight = losses_of(whole, tmp_path / "whole")
    resumed: dict[int, float] = {}

    def dies(step, metrics):
        resumed[step] = metrics["loss"]
        if step == 4:  # after the checkpoint at 3, inside the next stretch
            raise Killed

    with pytest.raises(Killed):
        make(config, dropout).fit(tmp_path / "cut", dies)
    again = make(config, dropout)
    resumed |= losses_of(again, tmp_path / "cut")
    assert resumed == straight
    assert same(whole.weights(), again.weights())


@pytest.mark.slow
def test_after_sigkill_the_loss_curve_is_that_of_an_uninterrupted_run(tmp_path):
    """A real kill -9 at whatever step the process happens to be in, twice, then a run to the end."""
    rng = np.random.default_rng()
    command = [sys.executable, str(HERE / "trainer_kill_driver.py"), str(tmp_path)]
    curve = tmp_path / "curve.jsonl"

    def rows() -> int:
        return len(curve.read_text().splitlines()) if curve.exists() else 0

    killed = []
    for _ in range(2):
        wanted = rows() + int(rng.integers(2, 7))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while rows() < wanted and process.poll() is None:
                time.sleep(0.002)
            time.sleep(float(rng.uniform(0, 0.05)))
            process.send_signal(signal.SIGKILL)
        killed.append(process.returncode)
    assert killed == [-signal.SIGKILL] * 2
    subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL)
    curve_rows = [json.loads(line) for line in curve.read_text().splitlines() if line.endswith("}")]
    from tests.training.trainer_kill_driver import KILLED

    straight = losses_of(make(KILLED), tmp_path / "straight")
    assert {row["step"] for row in curve_rows} == set(straight)
    assert all(row["loss"] == straight[row["step"]] for row in curve_rows)


def members(group: int) -> list[int]:
    """Processes of a group, but for those that have ended and wait to be collected."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its) == group and state != "Z":
                found.append(int(folder.name))
    return found


def hear_signals() -> None:
    """What a shell's background job or an earlier test ignores or blocks, a child would ignore too."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@pytest.mark.slow
def test_a_stop_signal_leaves_a_checkpoint_of_the_last_step_and_no_trace_in_the_weights(tmp_path):
    from tests.training.trainer_kill_driver import KILLED

    rng = np.random.default_rng()
    command = [sys.executable, str(HERE / "trainer_kill_driver.py"), str(tmp_path)]
    curve, root = tmp_path / "curve.jsonl", tmp_path / "checkpoints"

    def rows() -> list[dict]:
        return [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []

    for number, status in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        wanted = len(rows()) + int(rng.integers(2, 5))
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals
        ) as process:
            while len(rows()) < wanted and process.poll() is None:
                time.sleep(0.002)
            time.sleep(float(rng.uniform(0, 0.05)))
            process.send_signal(number)
            said, faults = process.communicate(timeout=120)
        assert process.returncode == status, said + faults
        last = rows()[-1]["step"] + 1
        assert newest(root) == root / f"checkpoint-{last}" and f"after step {last} of 24" in said
        assert str(root / f"checkpoint-{last}") in said and "Traceback" not in faults
    subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL)
    assert [row["step"] for row in rows()] == list(range(24)), "no step is made twice, none is left out"
    straight = make(KILLED)
    straight.fit(tmp_path / "straight", lambda step, metrics: None)
    made, _ = load_tensors(tmp_path / "last.safetensors")
    assert all(torch.equal(value, made[name]) for name, value in straight.weights(ema=False).items())


@pytest.mark.slow
def test_loader_processes_outlive_a_signal_to_the_whole_group(tmp_path):
    """Slurm and a terminal signal every process of a job."""
    command = [sys.executable, str(HERE / "trainer_kill_driver.py"), str(tmp_path), "2"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    ) as process:
        while not (tmp_path / "curve.jsonl").exists() or not (tmp_path / "curve.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        assert len(members(process.pid)) >= 3
        os.killpg(process.pid, signal.SIGTERM)
        said, faults = process.communicate(timeout=120)
    assert process.returncode == 75 and "Stopped on request" in said, said + faults
    until = time.monotonic() + 60
    while left := members(process.pid):
        assert time.monotonic() < until, f"loader processes are left behind: {left}"
        time.sleep(0.01)


def test_told_to_stop_it_stops_after_that_very_step_with_one_checkpoint(tmp_path):
    seen: list[int] = []
    asked = iter([False, True])
    with pytest.raises(Stopped, match="after step 2 of 6") as caught:
        make().fit(tmp_path, lambda step, metrics: seen.append(step), should_stop=lambda: next(asked))
    assert seen == [0, 1] and caught.value.file == str(tmp_path / "checkpoint-2")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_it_learns_and_says_what_it_cost(tmp_path):
    config = replace(CONFIG, steps=40, learning_rate=3e-3, checkpoint_every=1000)
    rows: list[dict[str, float]] = []
    make(config).fit(tmp_path, lambda step, m: rows.append(m))
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert rows[3].keys() >= {"loss", "grad_norm", "learning_rate", "cross_entropy_loss", "flow_loss", *TIMES} - {"mfu"}
    assert rows[3].keys() >= {"action_accuracy", "crl_loss", "flow_matching/toy", "fast/toy"}
    assert rows[3]["samples_per_s"] == pytest.approx(6 / rows[3]["step_time_s"])
    assert 0 <= rows[3]["data_wait_share"] <= 1 and 0.05 < rows[3]["memory_gb"] < 100
    assert rows[3]["tokens_per_s"] > 10 * rows[3]["samples_per_s"]


# ---- NaN ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("log_every", [1, 1000])
def test_nan_stops_before_it_is_saved_and_can_be_replayed(tmp_path, log_every):
    config = replace(CONFIG, log_every=log_every, checkpoint_every=2)
    trainer = make(config)
    source = trainer.batches.sources[0]
    poisoned = list(islice(trainer.batches.batches(trainer.batches.start()), 4))[3].ids
    for each in poisoned:
        source.chunks[int(each.rpartition(":")[2])] = np.nan
    with pytest.raises(StageError, match="not finite") as caught:
        trainer.fit(tmp_path, lambda step, m: None)
    note = json.loads((tmp_path / "nan_batch.json").read_text())
    bad = {i for i in note["ids"] if not np.isfinite(source.chunks[int(i.rpartition(":")[2])]).all()}
    assert bad and str(tmp_path / "nan_batch.json") in str(caught.value) and note["ids"][0] in str(caught.value)
    assert note["step"] <= 3 and note["seed"] == 7
    again = make(config)
    again.batches.sources = [source]
    replayed = again.replay(tmp_path)
    assert not np.isfinite(replayed["loss"])
    assert np.isfinite(make(config).replay(tmp_path)["loss"]), "the same samples, healthy"


# ---- micro-batches, precision, recomputation -----------------------------------------------------------------------
def one_step(config: TrainConfig, **change) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of the first step (clipping off)."""
    trainer = make(replace(config, clip_norm=1e9), **change)
    trainer.model.train()
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_):
        gradients.update((n, p.grad.clone()) for n, p in trainer.model.named_parameters() if p.grad is not None)

    trainer.engine.optimizer.register_step_pre_hook(keep)
    metrics, norm, _ = trainer.step(next(trainer._steps()), 0)
    return {k: float(v) for k, v in metrics.items()} | {"grad_norm": float(norm)}, gradients


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    scale = max(float(g.abs().max()) for g in left.values())
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=tolerance * scale, rtol=tolerance, msg=name)


def test_micro_batches_add_up_to_the_big_batch():
    config = replace(CONFIG, weights=LossWeights(fast=1.0, flow=1.0, contrastive=0.0))
    whole, gradients = one_step(config)
    parts, split = one_step(replace(config, accumulate=3))
    for name in ("loss", "cross_entropy_loss", "flow_loss", "action_accuracy", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name
    close(gradients, split, 1e-5)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_the_contrastive_loss_of_micro_batches_is_that_of_the_big_batch(parts):
    """Loss, every metric and gradient, with the other losses beside it: the negatives are all of the batch's."""
    config = replace(CONFIG, batch_size=12, weights=LossWeights(fast=0.5, flow=1.0, contrastive=1.0))
    whole, gradients = one_step(config)
    split, others = one_step(replace(config, accumulate=parts))
    assert split.keys() == whole.keys() and split["crl_loss"] > 0
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    close(gradients, others, 1e-5)


def test_recomputed_activations_change_nothing():
    """Losses and gradients to the bit, through the keys and values that the action head reads."""
    plain, gradients = one_step(CONFIG)
    again, recomputed = one_step(replace(CONFIG, activation_checkpointing=True))
    assert plain == again
    close(gradients, recomputed, 0.0)


def test_recomputed_activations_are_not_kept():
    """What the backward pass keeps beside weights, in bytes, is less than half."""
    from torch.autograd.graph import saved_tensors_hooks

    kept = {}
    for on in (False, True):
        trainer = make(replace(CONFIG, activation_checkpointing=on))
        trainer.model.train()
        batch = next(trainer._steps())[0]
        weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor, seen=seen, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            encoded = trainer.model.encode(batch.tokens)
        kept[on] = sum(seen.values())
        del encoded
    assert kept[True] < 0.5 * kept[False]


def test_bf16_keeps_fp32_weights_and_comes_near():
    plain, gradients = one_step(CONFIG)
    trainer = make(replace(CONFIG, precision="bf16"))
    half, other = one_step(replace(CONFIG, precision="bf16"))
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert all(g.dtype == torch.float32 for g in other.values())
    for name in ("loss", "cross_entropy_loss", "flow_loss"):
        assert half[name] != plain[name] and half[name] == pytest.approx(plain[name], rel=0.05), name
    left, right = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, other))
    assert float(torch.nn.functional.cosine_similarity(left, right, dim=0)) > 0.98


# ---- what is told by group of parameters ---------------------------------------------------------------------------
def test_norms_of_gradients_and_updates_are_told_by_group(tmp_path):
    """The ratio is that of the weights before and after the very step, the norms add up to the whole gradient's."""
    trainer = make(replace(CONFIG, clip_norm=1e9))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.model.train()
    metrics, norm, _ = trainer.step(next(trainer._steps()), 0, detail=True)
    told = trainer._told(metrics)
    squares = {name.partition("/")[2]: told[name] ** 2 for name in told if name.startswith("grad_norm/")}
    assert squares.keys() == set(GROUPS) and sum(squares.values()) == pytest.approx(float(norm) ** 2, rel=1e-5)
    after = {name: p.detach() for name, p in trainer.model.named_parameters()}
    for group in GROUPS:
        names = [name for name in before if group_of(name) == group]
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names])
        size = torch.cat([after[name].flatten() for name in names])
        # A weight of about 1 keeps a change of 1e-4 to three digits.
        assert told[f"update_ratio/{group}"] == pytest.approx(float(moved.norm() / size.norm()), rel=2e-3), group


# ---- evaluation --------------------------------------------------------------------------------------------------
def test_held_out_losses_are_those_of_the_averaged_weights(tmp_path):
    tokenizer = text_tokenizer()
    held_out = batches([toy(tokenizer, "held", seed=5)], CONFIG)
    config = replace(CONFIG, eval_every=2, eval_batches=2)
    trainer = make(config, held_out=held_out)
    rows: dict[int, dict[str, float]] = {}
    trainer.fit(tmp_path, lambda step, m: rows.__setitem__(step, m))
    assert [s for s, m in rows.items() if "eval/loss" in m] == [1, 3, 5]
    assert "eval/flow_matching/held" in rows[1] and rows[1]["eval/loss"] != rows[3]["eval/loss"]
    assert {s: m["loss"] for s, m in rows.items()} == losses_of(make(CONFIG), tmp_path / "plain"), "it leaves no trace"
    assert trainer.evaluate() == {k: v for k, v in rows[5].items() if k.startswith("eval/")}
    load_weights(trainer.model, trainer.weights(), "the average")
    assert trainer.evaluate() == {k: v for k, v in rows[5].items() if k.startswith("eval/")}


# ---- checkpoints -------------------------------------------------------------------------------------------------
def test_frozen_parts_have_no_state_and_do_not_move(tmp_path):
    config = replace(CONFIG, weights=LossWeights(fast=1.0, flow=1.0, contrastive=0.0))
    tokenizer = text_tokenizer()
    model = network(tokenizer)
    from prts_core.training.optim import freeze

    freeze(model, ("vision", "merger", "contrastive"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = Trainer(model, batches([toy(tokenizer)], config), config, 7)
    trainer.fit(tmp_path, lambda step, m: None)
    moved = {k.partition(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"language_model", "dit_action_head"}
    assert not any(shard.partition("/")[2].startswith("visual") for shard in trainer.engine.shards())
    assert trainer.weights().keys() == before.keys()


def test_without_averaged_weights_the_last_ones_are_exported_and_none_are_kept(tmp_path):
    config = replace(CONFIG, ema_decay=0.0)
    trainer, averaged = make(config), make(CONFIG)
    assert losses_of(trainer, tmp_path / "off") == losses_of(averaged, tmp_path / "on")
    assert not any(name.startswith("ema/") for name in trainer.engine.shards())
    assert same(trainer.weights(), averaged.weights(ema=False)) and not same(trainer.weights(), averaged.weights())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    losses_of(make(CONFIG), tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate: 0.0015 then, 0.001 now"):
        make(replace(CONFIG, learning_rate=1e-3, log_every=3)).fit(tmp_path, lambda step, m: None)


def test_the_curve_that_is_kept_does_not_know_how_often_it_was_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CURVE_POINTS", 3)
    kept = []
    for log_every in (1, 5, 1000):
        rows: dict[int, float] = {}
        make(replace(CONFIG, log_every=log_every)).fit(
            tmp_path / str(log_every), lambda step, metrics, rows=rows: rows.update({step: metrics["loss"]})
        )
        assert set(range(0, 6, log_every)) <= rows.keys()
        kept.append({step: loss for step, loss in rows.items() if loop.on_curve(CONFIG, step)})
    assert kept[0].keys() == {0, 2, 4, 5} and kept[0] == kept[1] == kept[2]
