"""Compiled blocks compute what the others do, for every length, with recomputed activations, under the same names."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from prts_core.config.model import DitConfig, TokensConfig
from prts_core.models import compiled
from prts_core.models.compiled import compile_blocks
from prts_core.models.prts import PrtsModel
from prts_core.text import prompt
from prts_core.training.recompute import recompute_activations


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(compiled._Compiled, "failed", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def outcome(model, build, samples):
    """Hidden states and gradients of a batch of two samples, then of one of three, which are longer."""
    out = []
    for count, response in ((2, False), (3, True)):
        images = np.random.default_rng(count).integers(0, 256, (2 * count, 32, 32, 3)).astype(np.uint8)
        tokens = build(samples[:count], images, response=response, contrastive=response)
        model.zero_grad()
        torch.manual_seed(0)
        encoded = model.encode(tokens)
        x, mask = torch.randn(2 * count, 4, 8), torch.ones(2 * count, 4, 8)
        if isinstance(model.config.expert, TokensConfig):
            velocity = model.action_logits(encoded.prefix(), mask[:count])
        else:
            velocity = model.velocity(encoded.prefix(), x, mask, torch.rand(2 * count))
        (encoded.hidden[tokens.sample >= 0].square().mean() + velocity.square().mean()).backward()
        out += [encoded.hidden, velocity, *(p.grad for p in model.parameters() if p.grad is not None)]
    return out


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("head", "recompute"), [("mot", True), ("dit", False), ("tokens", True)])
def test_compiled_blocks_are_the_plain_ones(model, tiny, tokenizer, build, samples, head, recompute):
    network = model.train()
    if head != "mot":
        dit = DitConfig(num_layers=2, num_heads=2, head_dim=8, output_dim=16)
        config = replace(tiny, expert=dit if head == "dit" else TokensConfig(bins=32))
        network = PrtsModel(config, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    fast = copy.deepcopy(network)
    names = list(fast.state_dict())
    compile_blocks(fast, "aot_eager")
    if recompute:
        recompute_activations(fast)
    assert list(fast.state_dict()) == names
    for ours, theirs in zip(outcome(fast, build, samples), outcome(network, build, samples), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not compiled._Compiled.failed
    # A few for each of the five functions (first lengths, all lengths; the DiT's blocks are of two kinds), not for each
    # of the blocks too. A tokens head's queries pass the language model's once more.
    assert 0 < counters["stats"]["unique_graphs"] <= (20 if head == "tokens" else 14)


def test_where_torch_cannot_compile_one_line_says_so_and_nothing_changes(model, build, samples, caplog):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    plain = copy.deepcopy(model)
    compile_blocks(model, broken)
    with caplog.at_level(logging.WARNING, compiled.__name__):
        got = outcome(model, build, samples)
    for ours, theirs in zip(got, outcome(plain, build, samples), strict=True):
        assert torch.equal(ours, theirs)
    (line,) = [r.getMessage() for r in caplog.records if r.name == compiled.__name__]
    assert "not compiled" in line and "no compiler here" in line


def test_recomputation_comes_after(model):
    recompute_activations(model)
    with pytest.raises(ValueError, match="before recompute_activations"):
        compile_blocks(model)
