"""A flow policy draws chunks whose log-probabilities it gives again, and without noise it acts as ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prts_core.config.model import DitConfig
from prts_core.config.rl import ExplorationConfig
from prts_core.io.errors import CheckpointError, ConfigError
from prts_core.models.prts import PrtsModel
from prts_core.rl.policies import flow, policy_kind
from prts_core.text import prompt

REAL = 3


@pytest.fixture(params=["mot", "dit"])
def network(request, tiny, tokenizer):
    expert = tiny.expert if request.param == "mot" else DitConfig(num_layers=2, num_heads=2, head_dim=8, output_dim=16)
    torch.manual_seed(0)
    made = PrtsModel(replace(tiny, expert=expert), len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made.eval()


@pytest.fixture
def prefix(network, build, samples):
    images = np.random.default_rng(0).integers(0, 256, (2 * len(samples), 32, 32, 3)).astype(np.uint8)
    with torch.no_grad():
        return network.encode(build(samples, images, response=False, contrastive=False)).prefix()


def drawn(network, prefix, exploration, seeds=(1, 2, 3)):
    noise, step = zip(
        *(flow.draw_noise(network, exploration, torch.Generator().manual_seed(s)) for s in seeds), strict=True
    )
    mask = torch.zeros(3, 4, 8)
    mask[..., :REAL] = 1
    net = flow.exploration_net(network, exploration)
    if net is not None:
        torch.nn.init.normal_(net.layers[4].weight)
    noise, step = torch.stack(noise), torch.stack(step)
    return flow.draw(network, prefix, mask, noise, step, exploration, net), mask, net


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
@pytest.mark.parametrize("joint", [False, True])
def test_what_was_drawn_is_evaluated_to_the_bit(network, prefix, method, joint):
    exploration = ExplorationConfig(method=method, joint=joint, correlation=0.4)
    found, mask, net = drawn(network, prefix, exploration)
    assert policy_kind(network) is flow
    assert found.actions.shape == (3, 4, 8) and not found.actions[..., REAL:].any()
    assert {name: len(x) for name, x in found.record.items()} == {"states": 3, "step": 3}
    log_probs, entropy = flow.evaluate(network, prefix, found.record, mask, exploration, net)
    assert torch.equal(log_probs, found.log_probs) and not log_probs[..., REAL:].any() and log_probs.any()
    assert entropy is None if found.entropy is None else torch.equal(entropy, found.entropy)
    log_probs.sum().backward()
    assert all(p.grad is not None for p in network.dit_action_head.parameters())
    assert net is None or all(p.grad is not None for p in net.parameters())


def test_an_episodes_noise_is_its_own(network, prefix):
    exploration = ExplorationConfig()
    first, _, _ = drawn(network, prefix, exploration)
    again, _, _ = drawn(network, prefix, exploration)
    other, _, _ = drawn(network, prefix, exploration, (1, 2, 4))
    assert torch.equal(first.actions, again.actions)
    assert torch.equal(first.actions[:2], other.actions[:2]) and not torch.equal(first.actions[2], other.actions[2])


def test_the_start_is_the_policys_own_noise_unless_said_otherwise(network, prefix):
    network.config = replace(network.config, expert=replace(network.config.expert, noise_scale=0.0))
    assert not drawn(network, prefix, ExplorationConfig(step=0))[0].record["states"][:, 0].any()
    assert drawn(network, prefix, ExplorationConfig(step=0, start_noise=1.0))[0].record["states"][:, 0].any()


def test_what_cannot_be_drawn_is_refused(network):
    with pytest.raises(ConfigError, match="adds no noise"):
        flow.exploration_net(network, ExplorationConfig(method="flow_cps", step=-1))
    network.config = replace(network.config, expert=None)
    with pytest.raises(CheckpointError, match="no action head"):
        policy_kind(network)
