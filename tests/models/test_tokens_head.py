"""A tokens head: its bins, what its queries may see, what counts in its loss, and the law of its draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prts_core.config.checked_yaml import check
from prts_core.config.load import read_model
from prts_core.config.model import ModelConfig, TokensConfig
from prts_core.io.errors import CheckpointError, ConfigError
from prts_core.models.heads.tokens.density import draw_tokens, entropy, token_log_probs
from prts_core.models.heads.tokens.loss import bin_values, bins_loss, to_bins
from prts_core.models.prts import PrtsModel
from prts_core.text import prompt

BINS = 16


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
    return network.encode(build(samples, images, response=False, contrastive=False)).prefix()


def mask_of(*widths: int) -> torch.Tensor:
    return (torch.arange(8) < torch.tensor(widths)[:, None]).float()[:, None].expand(-1, 4, -1)


def test_the_kind_makes_the_head():
    assert check(ModelConfig, {"expert": {"kind": "tokens"}}, "x").expert == TokensConfig(bins=256)
    file = Path(__file__).parents[2] / "configs" / "models" / "tiny_tokens.yaml"
    assert read_model(file)[0].expert == TokensConfig(bins=256)
    with pytest.raises(ConfigError, match="bins"):
        check(ModelConfig, {"expert": {"kind": "tokens", "bins": 2}}, "x")


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=20), st.integers(3, 300))
def test_a_bin_is_the_nearest_value(actions, bins):
    actions = torch.tensor(actions)
    found, values = to_bins(actions, bins), bin_values(bins)
    assert found.min() >= 0 and found.max() < bins and len(values) == bins
    distance = (values[found] - actions.clamp(-1, 1)).abs()
    assert (distance <= 1 / (bins - 1) + 1e-6).all()  # half an interval
    assert torch.equal(values[to_bins(values, bins)], values)


def test_the_ends_of_the_range():
    assert to_bins(torch.tensor([-3.0, -1.0, 1.0, 3.0]), 256).tolist() == [0, 0, 255, 255]
    assert bin_values(256)[254] == bin_values(256)[255] == pytest.approx(1 - 1 / 255)


def test_padded_dimensions_and_prompts_change_nothing(network, prefix):
    mask = mask_of(3, 5, 3)
    with torch.no_grad():
        before = network.action_logits(prefix, mask)
        assert before.shape == (3, 4, 8, BINS)
        network.dit_action_head.dimension_embedding.weight[5:] += 10
        for kept in (*prefix.keys, *prefix.values):
            kept.transpose(1, 2)[~prefix.visible] += 100
        after = network.action_logits(prefix, mask)
        alone = network.action_logits(prefix.map(lambda x: x[1:2]), mask[1:2])
    real = mask > 0
    torch.testing.assert_close(after[real], before[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone[0][real[1]], before[1][real[1]], atol=1e-4, rtol=1e-3)


def test_queries_see_the_prompt_and_each_other(network, prefix):
    mask = mask_of(3, 3, 3)
    with torch.no_grad():
        before = network.action_logits(prefix, mask)
        network.dit_action_head.row_embedding.weight[3] += 0.5  # of the last row, which the first sees, too
        assert not torch.allclose(network.action_logits(prefix, mask)[:, 0], before[:, 0], atol=1e-4)
        network.dit_action_head.row_embedding.weight[3] -= 0.5
        for kept in prefix.values:
            kept[:, :, 0] += 1
        assert not torch.allclose(network.action_logits(prefix, mask), before, atol=1e-3)


def test_queries_stand_behind_the_prompt(network, prefix, build, samples):
    tokens = build(samples, np.zeros((6, 32, 32, 3), np.uint8), response=False, contrastive=False)
    last = tokens.prompt_end - 1
    assert torch.equal(prefix.following, tokens.positions[0, torch.arange(3), last] + 1)
    with torch.no_grad():
        before = network.action_logits(prefix, mask_of(3, 3, 3))
        prefix.following += 5
        assert not torch.allclose(network.action_logits(prefix, mask_of(3, 3, 3)), before, atol=1e-4)


def test_the_policy_says_its_likeliest_bins(network, prefix):
    mask = mask_of(3, 5, 3)
    with torch.no_grad():
        wanted = bin_values(BINS)[network.action_logits(prefix, mask).argmax(-1)] * mask
    assert torch.equal(network.sample(prefix, torch.randn(3, 4, 8), mask), wanted)
    with pytest.raises(CheckpointError, match="has no velocity"):
        network.velocity(prefix, torch.zeros(3, 4, 8), mask, torch.zeros(3))


def test_the_loss_counts_each_samples_own_entries():
    logits = torch.zeros(2, 3, 4, BINS)
    actions = torch.full((2, 3, 4), -1.0)
    mask = torch.zeros(2, 3, 4)
    mask[0, :, :2], mask[1] = 1, 1
    logits[0, :, 2:, 5] = 100.0  # padding of sample 0: must not count
    logits[1, :2, :, 0] = 100.0
    pad = torch.tensor([[False, False, True], [False, False, False]])
    each, right = bins_loss(logits, actions, mask, pad)
    uniform = float(np.log(BINS))
    assert each.tolist() == pytest.approx([uniform, uniform / 3], abs=1e-5) and right.tolist() == [1.0, 1.0]


@given(
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 20),
    masked=st.integers(0, 10),
    seed=st.integers(0, 2**20),
)
def test_what_is_drawn_is_evaluated_to_the_bit_and_is_finite(temperature, top_k, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, 2, 3, BINS, generator=generator)
    logits[..., :masked] = -torch.inf
    logits.requires_grad_()
    uniform = torch.rand(5, 2, 3, generator=generator)
    uniform[0] = 0.0
    uniform[1] = 1 - 2**-24
    tokens, log_probs, told = draw_tokens(logits, uniform, temperature, top_k)
    assert (tokens >= masked).all() and (tokens < BINS).all()
    again, twice = token_log_probs(logits, tokens.int(), temperature, top_k)
    assert torch.equal(again, log_probs) and torch.equal(twice, told)
    assert log_probs.isfinite().all() and (told >= -1e-6).all()
    if top_k:
        best = logits.topk(min(top_k, BINS), -1).values[..., -1]
        assert (logits.gather(-1, tokens[..., None])[..., 0] >= best).all()
    (again.sum() + twice.sum()).backward()
    assert logits.grad.isfinite().all()
    moved = logits.detach() + 3 * torch.randn(logits.shape, generator=generator)  # the weights have moved on
    assert token_log_probs(moved, tokens, temperature, top_k)[0].isfinite().all()


def test_draws_have_the_law_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    uniform = torch.linspace(0, 1 - 1e-6, 100_001)
    tokens, _, _ = draw_tokens(logits.expand(len(uniform), -1), uniform, 1.6)
    shares = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(shares, (logits / 1.6).softmax(-1), atol=1e-4, rtol=0)


def test_entropy_of_a_certain_token_is_0_and_of_all_alike_its_logarithm():
    certain = torch.tensor([0.0, -torch.inf, -torch.inf])
    assert entropy(certain.log_softmax(-1)) == 0
    assert entropy(torch.zeros(8).log_softmax(-1)).item() == pytest.approx(np.log(8))
