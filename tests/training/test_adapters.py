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
from prts_core.training.adapters import adapter_tensors, add_adapters, merged, remove_adapters
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
