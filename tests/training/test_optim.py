"""Groups, rates and freezing: every parameter belongs to one group, and the public recipe can be said."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prts_core.config.load import load_plan
from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError
from prts_core.training.optim import (
    GROUPS,
    count,
    freeze,
    group_of,
    learning_rate,
    make_optimizer,
    parameter_groups,
    schedule,
    set_rates,
)

CONFIGS = Path(__file__).parents[2] / "configs"
RATES = TrainConfig(
    learning_rate=1.0,
    vision_lr=0.5,
    merger_lr=0.25,
    action_lr=4.0,
    weight_decay=0.1,
    warmup_steps=10,
    steps=100,
    min_learning_rate=0.1,
)


def test_schedule_warms_up_and_comes_down():
    rates = [learning_rate(RATES, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates[9] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1, abs=0.01)
    assert schedule(RATES, 55) == pytest.approx(0.1 + 0.9 * 0.5)


@given(st.sampled_from(["cosine", "constant", "wsd"]), st.integers(0, 50), st.integers(60, 400), st.floats(0.01, 1.0))
def test_a_schedule_rises_to_its_peak_and_never_rises_again(kind, warmup, steps, share):
    config = replace(RATES, schedule=kind, warmup_steps=warmup, steps=steps, decay_share=share)
    rates = [schedule(config, step) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(a <= b for a, b in pairwise(rates[: top + 1])) and all(0 < rate <= 1 for rate in rates)
    assert all(a >= b for a, b in pairwise(rates[top:])) and min(rates[warmup:]) >= 0.1
    assert top <= warmup
    if kind == "constant":
        assert set(rates[warmup:]) == {1.0}
    if kind == "wsd":
        stable = rates[warmup : int((1 - share) * steps)]
        assert (set(stable) <= {1.0} and rates[-1] <= 0.1 + 0.9 / (share * steps) + 1e-9) or share * steps < 1


def test_lower_layers_may_learn_more_slowly(model):
    groups = parameter_groups(model, replace(RATES, layer_decay=0.5))
    rate = {id(p): g["peak_lr"] for g in groups for p in g["params"]}
    top = model.language_model.config.num_hidden_layers - 1
    for name, expected in (
        (f"language_model.layers.{top}.mlp.up_proj.weight", 1.0),
        (f"language_model.layers.{top - 1}.mlp.up_proj.weight", 0.5),
        ("language_model.embed_tokens.weight", 0.5 ** (top + 1)),
        ("language_model.norm.weight", 1.0),
        ("visual.blocks.0.attn.qkv.weight", 0.5),
        ("dit_action_head.action_in_proj.weight", 4.0),
    ):
        assert rate[id(model.get_parameter(name))] == pytest.approx(expected), name
    assert len(rate) == len(list(model.parameters()))


def test_every_parameter_is_in_one_group_with_its_rate_and_decay(model):
    groups = {g["group"]: g for g in parameter_groups(model, RATES)}
    assert set(groups) == {f"{g}{e}" for g in GROUPS for e in ("", "/no_decay")} | {"contrastive/scalar"}
    inside = [p for g in groups.values() for p in g["params"]]
    assert len(inside) == len(set(inside)) == len(list(model.parameters()))
    for name, end in (
        ("visual.merger.linear_fc1.weight", "merger"),
        ("visual.blocks.0.attn.qkv.weight", "vision"),
        ("visual.deepstack_merger_list.0.linear_fc1.bias", "merger/no_decay"),
        ("language_model.embed_tokens.weight", "llm/no_decay"),
        ("language_model.norm.weight", "llm/no_decay"),
        ("crl_logit_scale", "contrastive/scalar"),
        ("dit_action_head.action_in_proj.weight", "action"),
    ):
        assert any(p is model.get_parameter(name) for p in groups[end]["params"]), name
    assert {g: groups[g]["peak_lr"] for g in GROUPS} == {
        "llm": 1.0,
        "vision": 0.5,
        "merger": 0.25,
        "action": 4.0,
        "contrastive": 1.0,
    }
    assert groups["vision"]["weight_decay"] == 0.1 and groups["vision/no_decay"]["weight_decay"] == 0.0
    set_rates(groups.values(), RATES, 0)
    assert groups["action"]["lr"] == pytest.approx(0.4), "one schedule for all"


def test_what_is_frozen_is_not_in_the_optimiser_and_counts_as_such(model):
    freeze(model, ("vision", "contrastive"))
    held = {id(p) for g in make_optimizer(model, RATES).param_groups for p in g["params"]}
    assert all((id(p) in held) == (group_of(n) not in ("vision", "contrastive")) for n, p in model.named_parameters())
    rows = {row.group: row for row in count(model)}
    assert rows["vision"].trainable == 0 < rows["vision"].total and rows["llm"].share == 1.0
    assert rows["all"].total == sum(p.numel() for p in model.parameters())
    assert rows["all"].trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_wrong_groups_are_told_by_name(model):
    with pytest.raises(ConfigError, match=r"did you mean 'vision'.*llm, vision, merger, action, contrastive"):
        freeze(model, ("visoin",))
    freeze(model, GROUPS)
    with pytest.raises(ConfigError, match="Nothing is left to train"):
        parameter_groups(model, TrainConfig(freeze=GROUPS))


def test_the_public_recipe_is_said_in_our_terms(monkeypatch):
    monkeypatch.setenv("LIBERO_ROOT", "/nowhere")
    plan = load_plan(CONFIGS / "libero_posttraining.yaml")
    train, model = plan.sft("libero").train, plan.model
    assert (train.steps, train.batch_size, train.warmup_steps, train.accumulate) == (30_000, 32, 5000, 1)
    assert (train.learning_rate, train.action_lr, train.min_learning_rate) == (1e-5, 1e-4, 1e-6)
    assert (train.betas, train.adam_eps, train.weight_decay, train.clip_norm) == ((0.9, 0.95), 1e-8, 1e-8, 1.0)
    assert (train.precision, train.engine, train.normalization) == ("bf16", "zero2", "QUANTILE")
    assert (model.chunk_length, model.max_action_dim, plan.recipe.seed) == (20, 32, 42)
    optimizer = make_optimizer(torch.nn.ModuleDict({"dit_action_head": torch.nn.Linear(2, 2)}), train)
    assert optimizer.defaults["fused"] and optimizer.defaults["eps"] == 1e-8
