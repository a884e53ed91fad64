"""The memory estimate against numbers worked out by hand, and activations against what a backward pass really keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from prts_core.cli import main as cli
from prts_core.config.model import TokensConfig
from prts_core.config.train import LoraConfig, LossWeights, TrainConfig
from prts_core.training.losses import prts_loss
from prts_core.training.memory import Load, activations, estimate
from tests.training.runs import MODEL, batches, network, text_tokenizer, toy

CONFIGS = Path(__file__).parents[2] / "configs"
NOTHING = Load(samples=0, tokens=0, visual_tokens=0, answer=0, vocabulary=0)


@pytest.mark.parametrize(
    ("precision", "engine", "weights", "gradients", "optimizer", "ema"),
    [
        ("fp32", "single", 20.0, 16.0, 32.0, 16.0),
        ("bf16", "single", 28.0, 16.0, 32.0, 16.0),
        ("bf16", "fsdp", 5.0, 4.0, 8.0, 4.0),
        ("bf16", "auto", 5.0, 4.0, 8.0, 4.0),
        ("bf16", "zero1", 20.0, 16.0, 12.0, 4.0),
        ("bf16", "zero2", 20.0, 4.0, 12.0, 4.0),
        ("bf16", "zero3", 5.0, 4.0, 12.0, 4.0),
        ("fp32", "zero2", 20.0, 4.0, 12.0, 4.0),
    ],
)
def test_states_of_five_billion_parameters_of_which_four_train_on_four_gpus(
    precision, engine, weights, gradients, optimizer, ema
):
    config = TrainConfig(precision=precision, engine=engine)
    made = estimate(5 * 10**9, 4 * 10**9, MODEL, config, 4, NOTHING)
    assert (made.weights, made.gradients, made.optimizer, made.ema) == (
        weights * 1e9,
        gradients * 1e9,
        optimizer * 1e9,
        ema * 1e9,
    )
    assert made.activations == 0 and made.total == pytest.approx((weights + gradients + optimizer + ema) * 1e9)


@pytest.mark.parametrize(("base", "weights"), [("fp32", 20.0), ("auto", 10.4), ("nf4", 10.4)])
def test_what_lora_freezes_is_counted_as_it_is_held(base, weights):
    """Of five billion parameters 0.2 train; the model's own layers, of a tiny one here, are all that NF4 holds."""
    config = TrainConfig(precision="bf16", engine="fsdp", lora=LoraConfig(base=base))
    made = estimate(5 * 10**9, 2 * 10**8, MODEL, config, 1, NOTHING)
    saved = (2 - 0.52) * MODEL.text.parameters if base == "nf4" else 0.0
    assert made.weights == pytest.approx(weights * 1e9 - saved, rel=1e-12)


def test_logits_and_recomputation_by_hand():
    load = Load(samples=2, tokens=100, visual_tokens=0, answer=10, vocabulary=1000)
    only_text = TrainConfig(weights=LossWeights(fast=1.0, flow=0.0), precision="bf16")
    t = MODEL.text  # 2 layers: hidden 48, 4 query and 2 key heads of 16, SwiGLU 64
    inside = 6 * 48 + 5 * 64 + 5 * 32 + 4 * 64
    assert activations(MODEL, only_text, load) == 2 * (200 * t.num_layers * inside) + 10 * (2 * 10 * 1000)
    again = replace(only_text, activation_checkpointing=True)
    assert activations(MODEL, again, load) == 2 * 200 * (2 * (48 + 2 * 2 * 16) + inside) + 10 * 20_000


@pytest.mark.parametrize("shapes", [MODEL, replace(MODEL, expert=TokensConfig(bins=32))], ids=["mot", "tokens"])
def test_activations_are_near_what_a_backward_pass_keeps(shapes):
    config = TrainConfig(batch_size=6, flow_samples=1, weights=LossWeights(contrastive=0.0))
    tokenizer = text_tokenizer()
    model = network(tokenizer, shapes).train()
    source = batches([toy(tokenizer)], config)
    batch = next(source.batches(source.start()))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = prts_loss(model, batch, config, torch.Generator().manual_seed(0))
    width, answer = batch.tokens.ids.shape[1], int((batch.tokens.labels != -100).sum()) // 6
    said = activations(shapes, config, Load(6, width, 4, answer, len(tokenizer)))
    assert loss.requires_grad and 0.6 < said / sum(kept.values()) < 1.6


@pytest.mark.parametrize(("recipe", "gpus", "share"), [("libero_posttraining", 4, "99.8%"), ("my_robot", 1, None)])
def test_the_public_recipes_are_dry_run_at_4b(recipe, gpus, share, monkeypatch, capsys):
    monkeypatch.setenv("LIBERO_ROOT", "/nowhere")
    monkeypatch.setenv("MY_ROBOT_ROOT", "/nowhere")
    named = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--set", "sft.train.engine=auto"]
    assert cli.main(["dryrun", *named, "--gpus", str(gpus)]) == 0
    said = capsys.readouterr().out
    assert "4,027,040,256" in said or recipe == "my_robot"
    assert "GiB a GPU" in said and "estimate" in said and (share is None or share in said)
    assert f"engine {'single' if gpus == 1 else 'fsdp'}," in said
    total = float(next(line for line in said.splitlines() if "total " in line and "GiB" in line).split()[1])
    assert 20 < total < 80, "it fits the GPUs that the recipe names"


def test_a_batch_that_does_not_split_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LIBERO_ROOT", "/nowhere")
    assert cli.main(["dryrun", "--config", str(CONFIGS / "libero_posttraining.yaml"), "--gpus", "5"]) == 1
    assert "does not split evenly" in capsys.readouterr().err
