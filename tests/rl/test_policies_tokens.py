"""A tokens policy draws chunks whose log-probabilities it gives again, from numbers that a seed alone gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prts_core.config.model import TokensConfig
from prts_core.config.rl import ExplorationConfig
from prts_core.models.heads.tokens.loss import bin_values
from prts_core.models.prts import PrtsModel
from prts_core.rl.policies import policy_kind, tokens
from prts_core.text import prompt

REAL, BINS = 3, 16


@pytest.fixture
def network(tiny, tokenizer):
    torch.manual_seed(0)
    config = replace(tiny, expert=TokensConfig(bins=BINS))
    made = PrtsModel(config, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made.eval()


@pytest.fixture
def prefix(network, build, samples):
    images = np.random.default_rng(0).integers(0, 256, (2 * len(samples), 32, 32, 3)).astype(np.uint8)
    with torch.no_grad():
        return network.encode(build(samples, images, response=False, contrastive=False)).prefix()


def drawn(network, prefix, exploration, seeds=(1, 2, 3)):
    found = [tokens.draw_noise(network, exploration, torch.Generator().manual_seed(s)) for s in seeds]
    noise, step = (torch.stack(x) for x in zip(*found, strict=True))
    assert noise.shape[1:] == tokens.noise_shape(network, exploration)
    mask = torch.zeros(3, 4, 8)
    mask[..., :REAL] = 1
    return tokens.draw(network, prefix, mask, noise, step, exploration, None), mask


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.6, 0), (0.7, 3)])
def test_what_was_drawn_is_evaluated_to_the_bit(network, prefix, temperature, top_k):
    exploration = ExplorationConfig(temperature=temperature, top_k=top_k)
    found, mask = drawn(network, prefix, exploration)
    assert policy_kind(network) is tokens and tokens.exploration_net(network, exploration) is None
    assert found.actions.shape == (3, 4, 8) and not found.actions[..., REAL:].any()
    said = found.record["tokens"].long()
    assert torch.equal(found.actions, bin_values(BINS)[said] * mask)
    log_probs, entropy = tokens.evaluate(network, prefix, found.record, mask, exploration, None)
    assert torch.equal(log_probs, found.log_probs) and torch.equal(entropy, found.entropy)
    assert not log_probs[..., REAL:].any() and (log_probs[..., :REAL] < 0).all() and (entropy[..., :REAL] > 0).all()
    (log_probs.sum() + entropy.sum()).backward()
    assert all(p.grad.isfinite().all() for p in network.dit_action_head.parameters())
    assert network.language_model.layers[0].self_attn.q_proj.weight.grad.any()


def test_an_episodes_draw_is_its_own(network, prefix):
    exploration = ExplorationConfig()
    first, again, other = (drawn(network, prefix, exploration, s)[0] for s in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(first.actions, again.actions)
    assert torch.equal(first.actions[:2], other.actions[:2]) and not torch.equal(first.actions[2], other.actions[2])


def test_near_0_the_temperature_gives_what_the_policy_does(network, prefix):
    found, mask = drawn(network, prefix, ExplorationConfig(temperature=1e-4))
    assert torch.equal(found.actions, network.sample(prefix, torch.zeros(3, 4, 8), mask))
