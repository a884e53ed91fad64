"""A model with an action head of tokens through the ordinary trainer, under every way of running it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prts_core.config.model import TokensConfig
from prts_core.config.train import LoraConfig, LossWeights, TrainConfig
from prts_core.io.errors import ConfigError
from prts_core.models.attention import choose_implementation
from prts_core.training.losses import prts_loss
from prts_core.training.recompute import recompute_activations
from prts_core.training.trainer import Trainer
from tests.fixtures.no_host_sync import Refusing
from tests.training.runs import CONFIG, MODEL, batches, network, text_tokenizer, toy

TOKENS = replace(MODEL, expert=TokensConfig(bins=32))
ALONE = LossWeights(fast=0.0, text=0.0, flow=1.0, contrastive=0.0)


def made(config: TrainConfig):
    tokenizer = text_tokenizer()
    source = batches([toy(tokenizer)], config)
    return network(tokenizer, TOKENS).train(), next(source.batches(source.start()))


def outcome(model, batch, config, seed: int = 0):
    model.zero_grad()
    loss, metrics = prts_loss(model, batch, config, torch.Generator().manual_seed(seed))
    loss.backward()
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_loss_falls(tmp_path):
    config = replace(CONFIG, steps=60, warmup_steps=5, learning_rate=5e-3, weights=ALONE, checkpoint_every=100)
    tokenizer = text_tokenizer()
    model = network(tokenizer, TOKENS)
    rows = []
    trainer = Trainer(model, batches([toy(tokenizer)], config), config, 7)
    trainer.fit(tmp_path, lambda step, metrics: rows.append(metrics))
    assert rows[0].keys() >= {"loss", "bins_loss", "bins_accuracy", "bins/toy"} and "flow_loss" not in rows[0]
    first, last = (sum(r["bins_loss"] for r in part) / len(part) for part in (rows[:10], rows[-10:]))
    assert last < first - 0.5
    assert rows[0]["bins_loss"] == pytest.approx(rows[0]["bins/toy"]) == pytest.approx(rows[0]["loss"])


def test_noise_is_no_matter_and_every_parameter_learns():
    config = replace(CONFIG, weights=LossWeights(1.0, 1.0, 1.0, 1.0))
    model, batch = made(config)
    one, gradients = outcome(model, batch, config)
    other, _ = outcome(model, batch, replace(config, flow_samples=1), seed=5)
    assert one["bins_loss"] == other["bins_loss"]
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert gradients["dit_action_head.out.weight"].any() and gradients["dit_action_head.row_embedding.weight"].any()
    # Dimensions that no robot of the batch has are seen by no query.
    assert not gradients["dit_action_head.dimension_embedding.weight"][3:].any()


def test_recomputed_activations_give_the_same_gradients():
    config = replace(CONFIG, weights=ALONE)
    model, batch = made(config)
    metrics, plain = outcome(model, batch, config)
    recompute_activations(model)
    again, recomputed = outcome(model, batch, config)
    assert metrics["loss"] == again["loss"]
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_micro_batches_add_up_to_the_batch():
    """Half of the samples by another count of the same step."""
    config = replace(CONFIG, weights=ALONE)
    tokenizer = text_tokenizer()
    losses = []
    for accumulate in (1, 2):
        recipe = replace(config, accumulate=accumulate)
        trainer = Trainer(network(tokenizer, TOKENS), batches([toy(tokenizer)], recipe), recipe, 7)
        trainer.model.train()
        metrics, _, _ = trainer.step(next(trainer._steps()), 0)
        losses.append(trainer._told(metrics)["bins_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_comes_near():
    config = replace(CONFIG, weights=ALONE)
    model, batch = made(config)
    plain, gradients = outcome(model, batch, config)
    with torch.autocast("cpu", torch.bfloat16):
        half, other = outcome(model, batch, config)
    assert half["loss"] != plain["loss"] and float(half["loss"]) == pytest.approx(float(plain["loss"]), rel=0.05)
    left, right = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, other))
    assert float(torch.nn.functional.cosine_similarity(left, right, dim=0)) > 0.98


def test_packed_prompts_are_read_as_padded_ones_are():
    config = replace(CONFIG, weights=ALONE, pack_length=400, pack_window=12, batch_size=2)
    tokenizer = text_tokenizer()
    packed = batches([toy(tokenizer)], config)
    plan = next(packed.plans(packed.start()))
    padded = batches([toy(tokenizer)], replace(config, pack_length=0))
    alike = padded[type(plan)([[d] for row in plan.rows for d in row], True, plan.begin, plan.cursor)]
    model = network(tokenizer, TOKENS).eval()
    ours, theirs = (prts_loss(model, b, config, torch.Generator())[1] for b in (packed[plan], alike))
    torch.testing.assert_close(ours["bins_loss"], theirs["bins_loss"], atol=1e-5, rtol=1e-5)


def test_a_batch_without_actions_still_reaches_every_parameter():
    config = replace(CONFIG, weights=LossWeights(1.0, 1.0, 1.0, 1.0))
    model, batch = made(config)
    none = torch.zeros(0, dtype=torch.int64)
    batch = replace(batch, acting=none, has_action=torch.zeros_like(batch.has_action))
    metrics, gradients = outcome(model, batch, config)
    assert metrics["bins_loss"] == 0 and gradients.keys() == dict(model.named_parameters()).keys()
    assert not gradients["dit_action_head.out.weight"].any()


def test_a_step_waits_for_nothing():
    config = replace(CONFIG, weights=LossWeights(1.0, 1.0, 1.0, 1.0))
    model, batch = made(config)
    choose_implementation(model.language_model, "reference")
    outcome(model, batch, config)
    with Refusing():
        loss, _ = prts_loss(model, batch, config, torch.Generator().manual_seed(0))
        loss.backward()


def test_adapters_train_with_it(tmp_path):
    pytest.importorskip("peft")
    from prts_core.training.adapters import add_adapters, merged

    lora = LoraConfig(rank=4)
    config = replace(CONFIG, weights=ALONE, lora=lora, steps=2)
    tokenizer = text_tokenizer()
    model = network(tokenizer, TOKENS)
    names = network(tokenizer, TOKENS).state_dict().keys()
    add_adapters(model, lora, tokenizer.own_ids)
    trainer = Trainer(model, batches([toy(tokenizer)], config), config, 7)
    trainer.fit(tmp_path, lambda step, metrics: None)
    assert merged(trainer.weights(), lora).keys() == names


def test_it_cannot_be_insulated():
    config = replace(CONFIG, weights=ALONE, insulate=True)
    model, batch = made(config)
    with pytest.raises(ConfigError, match="insulated"):
        prts_loss(model, batch, config, torch.Generator())
