"""LoRA: it starts as nothing, trains alone, resumes to the bit, and merges into plain weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from prts_core.config.identity import identity
from prts_core.config.train import LoraConfig, LossWeights
from prts_core.io.errors import ConfigError, MissingExtraError
from prts_core.io.tensors import load_weights
from prts_core.stages.training import early_weights
from prts_core.training.adapters import adapter_tensors, add_adapters, hold_base, merged, plain_base, remove_adapters
from prts_core.training.optim import count
from prts_core.training.trainer import Trainer
from tests.training.runs import CONFIG, batches, network, text_tokenizer, toy

pytest.importorskip("peft")
ROWS = "language_model.embed_tokens.rows"
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.2)
RECIPE = replace(CONFIG, lora=LORA, weights=LossWeights(1.0, 1.0, 1.0, 0.5))


def make() -> Trainer:
    tokenizer = text_tokenizer()
    model = network(tokenizer)
    add_adapters(model, LORA, tokenizer.own_ids)
    return Trainer(model, batches([toy(tokenizer)], RECIPE), RECIPE, 7)


def losses_of(trainer: Trainer, root, until: int = 99) -> dict[int, float]:
    out: dict[int, float] = {}

    def on_step(step, metrics):
        out[step] = metrics["loss"]
        if step == until:
            raise KeyboardInterrupt

    trainer.fit(root, on_step)
    return out


def test_only_adapters_and_heads_train_and_the_merged_policy_needs_no_peft(tmp_path):
    trainer = make()
    model, start = trainer.model, {k: v.clone() for k, v in trainer.model.state_dict().items()}
    losses_of(trainer, tmp_path)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    assert all("lora_" in k or k.startswith(("dit_action_head", "crl_")) or k == ROWS for k in moved)
    adapters = adapter_tensors(trainer.weights())
    assert len(adapters) == 2 * 7 * 2 + 2  # A and B, 7 layers, twice; rows of new tokens and their ids
    assert adapters.keys() - moved == {"language_model.embed_tokens.ids"}
    rows = {row.group: row for row in count(model)}
    assert 0 < rows["llm"].share < 0.5 and rows["vision"].trainable == 0

    plain = network(text_tokenizer())
    tensors = merged(trainer.weights(), LORA)
    load_weights(plain, tensors, "merged")
    batch = next(trainer._steps())[0]
    with torch.no_grad(), trainer.engine.averaged():
        wanted = model.eval().encode(batch.tokens).hidden
        assert not torch.allclose(wanted, network(text_tokenizer()).encode(batch.tokens).hidden, atol=1e-4)
        torch.testing.assert_close(plain.eval().encode(batch.tokens).hidden, wanted, atol=1e-5, rtol=1e-5)
    remove_adapters(model)
    load_weights(model, tensors, "the model itself, plain again")


def test_adapters_start_as_nothing():
    tokenizer = text_tokenizer()
    model = network(tokenizer).eval()
    batch = next(batches([toy(tokenizer)], CONFIG).batches({"sample": 0}))
    with torch.no_grad():
        before = model.encode(batch.tokens).hidden
        add_adapters(model, LORA, tokenizer.own_ids)
        assert torch.equal(model.eval().encode(batch.tokens).hidden, before)


def test_new_tokens_learn_and_the_others_stay(tmp_path):
    """FAST and PRTS tokens are noise to a pretrained backbone; its own words stay as they are, to the bit."""
    trainer, own = make(), text_tokenizer().own_ids
    before = trainer.model.language_model.embed_tokens.table.weight.clone()
    logits = trainer.model.logits(torch.ones(2, before.shape[1]))
    torch.testing.assert_close(logits, torch.ones(2, before.shape[1]) @ before.T)
    losses_of(trainer, tmp_path)
    after = merged(trainer.weights(), LORA)["language_model.embed_tokens.weight"]
    moved = (after != before).any(1).nonzero()[:, 0].tolist()
    assert moved and set(moved) <= set(own) and len(moved) > 20
    torch.testing.assert_close(
        trainer.model.logits(torch.ones(1, before.shape[1]))[0, own],
        trainer.model.language_model.embed_tokens.rows.sum(1),
    )


def held(base: str) -> Trainer:
    """A run in bf16 with the frozen matrices held so."""
    tokenizer = text_tokenizer()
    model, config = network(tokenizer), replace(RECIPE, precision="bf16")
    add_adapters(model, LORA, tokenizer.own_ids)
    hold_base(model, base)
    return Trainer(model, batches([toy(tokenizer)], config), config, 7)


def test_matrices_held_in_bf16_change_no_product(tmp_path):
    """Autocast rounds them so in any case. What is exported is the sum in fp32."""
    whole, half = held("fp32"), held("bf16")
    base = "language_model.layers.0.self_attn.q_proj.base_layer.weight"
    assert half.model.get_parameter(base).dtype == torch.bfloat16
    assert half.model.language_model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert losses_of(whole, tmp_path / "whole") == losses_of(half, tmp_path / "half")
    one, other = whole.weights(), half.weights()
    for name, value in adapter_tensors(one).items():
        assert torch.equal(value, other[name]), name
    assert merged(other, LORA)[base.replace("base_layer.", "")].dtype == torch.float32


def test_matrices_held_in_nf4_train_and_are_exported_as_they_were_computed_with(tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, small = held("fp32"), held("nf4")
    base = small.model.language_model.layers[0].self_attn.q_proj.base_layer
    assert base.weight.dtype == torch.uint8
    one, other = losses_of(whole, tmp_path / "whole"), losses_of(small, tmp_path / "small")
    assert other.keys() == one.keys() and other[0] == pytest.approx(one[0], rel=0.1) and other != one
    with torch.no_grad():
        said = base(torch.eye(base.in_features))
    plain_base(small.model)
    tensors = merged(small.weights(), LORA)
    plain = network(text_tokenizer())
    load_weights(plain, tensors, "merged")
    name = "language_model.layers.0.self_attn.q_proj"
    change = tensors[f"{name}.weight"] - small.model.get_parameter(f"{name}.base_layer.weight").float()
    assert change.abs().max() > 0, "the adapters are in it"
    torch.testing.assert_close(said.float().T, tensors[f"{name}.weight"] - change, atol=2e-3, rtol=1e-2)


def test_the_early_weights_of_a_packed_base_are_plain_ones(tmp_path):
    """The snapshot is taken while the base is packed; what is kept of it is what trained."""
    pytest.importorskip("bitsandbytes")
    trainer = held("nf4")
    trainer.fit(tmp_path, lambda step, metrics: None, {3: tmp_path / "early.safetensors"})
    plain_base(trainer.model)
    tensors = early_weights(tmp_path / "early.safetensors", trainer, trainer.weights(), LORA)
    plain = network(text_tokenizer())
    load_weights(plain, tensors, "early")
    last = merged(trainer.weights(), LORA)
    name = "language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(tensors[name], last[name]) and torch.equal(
        tensors["visual.blocks.0.attn.qkv.weight"], last["visual.blocks.0.attn.qkv.weight"]
    )


def test_a_base_smaller_than_the_arithmetic_is_refused():
    with pytest.raises(ConfigError, match="precision fp32") as caught:
        replace(RECIPE, lora=replace(LORA, base="nf4"))
    assert caught.value.field == "train.lora.base"


def test_a_resumed_run_is_bit_identical(tmp_path):
    straight = losses_of(make(), tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        losses_of(make(), tmp_path / "cut", until=4)
    resumed = losses_of(make(), tmp_path / "cut")
    assert resumed == {step: loss for step, loss in straight.items() if step >= 3}


def test_targets_that_do_not_exist_are_told():
    with pytest.raises(ConfigError, match=r"query.*q_proj"):
        add_adapters(network(text_tokenizer()), replace(LORA, targets=("query",)))


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"\.\[lora\]"):
        add_adapters(network(text_tokenizer()), LORA)


def test_the_recipe_is_plain_json():
    plain = identity(RECIPE)
    assert json.loads(json.dumps(plain)) == plain and plain["lora"]["rank"] == LORA.rank
