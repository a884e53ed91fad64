"""The action heads and flow matching: what counts in the loss, what padding may do, what a head may read."""

from __future__ import annotations

import pytest
import torch

from prts_core.config.checked_yaml import check
from prts_core.config.model import DitConfig, ModelConfig, MotConfig
from prts_core.io.errors import ConfigError
from prts_core.models.heads.dit.module import DitHead
from prts_core.models.heads.flow.loss import flow_loss, mask_noise
from prts_core.models.heads.flow.time import draw_time
from prts_core.models.heads.mot.module import MotHead
from prts_core.models.tokens import Prefix

SAMPLES, STEPS, WIDTH, PROMPT, HIDDEN = 3, 4, 6, 7, 24


@pytest.fixture(params=["mot", "dit", "plain dit"])
def head(request):
    torch.manual_seed(0)
    sizes = {"action_dim": WIDTH, "chunk_length": STEPS}
    if request.param == "mot":
        config = MotConfig(hidden_size=16, num_heads=4, intermediate_size=24)
        made = MotHead(config, layers=2, kv_heads=2, head_dim=8, **sizes)
    else:
        config = DitConfig(num_layers=4, num_heads=2, head_dim=8, output_dim=12, alternate=request.param == "dit")
        made = DitHead(config, memory_width=HIDDEN, **sizes)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture
def prefix():
    torch.manual_seed(1)
    visible = torch.arange(PROMPT) < torch.tensor([PROMPT, 5, 4])[:, None]
    image = torch.zeros(SAMPLES, PROMPT, dtype=torch.bool)
    image[:2, 1:3] = True  # the third sample has no image
    cache = [torch.randn(SAMPLES, 2, PROMPT, 8) for _ in range(4)]
    return Prefix(cache[:2], cache[2:], torch.randn(SAMPLES, PROMPT, HIDDEN), visible, image, visible.sum(1))


@pytest.fixture
def chunk():
    torch.manual_seed(2)
    mask = torch.zeros(SAMPLES, STEPS, WIDTH)
    for sample, width in enumerate((5, 3, 6)):
        mask[sample, :, :width] = 1
    return torch.randn(SAMPLES, STEPS, WIDTH) * mask, mask, torch.tensor([0.1, 0.5, 0.9])


def test_a_sample_equals_its_row_of_a_batch(head, prefix, chunk):
    together = head(*chunk, prefix)
    for s in range(SAMPLES):
        length = int(prefix.visible[s].sum())
        alone = Prefix(
            [k[s : s + 1, :, :length] for k in prefix.keys],
            [v[s : s + 1, :, :length] for v in prefix.values],
            prefix.hidden[s : s + 1, :length],
            prefix.visible[s : s + 1, :length],
            prefix.image[s : s + 1, :length],
            prefix.following[s : s + 1],
        )
        torch.testing.assert_close(head(*(x[s : s + 1] for x in chunk), alone)[0], together[s], atol=1e-5, rtol=1e-4)


def test_what_is_not_visible_changes_nothing(head, prefix, chunk):
    before = head(*chunk, prefix)
    hidden = ~prefix.visible
    prefix.hidden[hidden] += 100
    for cached in (*prefix.keys, *prefix.values):
        cached.transpose(1, 2)[hidden] += 100
    torch.testing.assert_close(head(*chunk, prefix), before, atol=1e-5, rtol=1e-4)
    prefix.hidden[:, 0] += 1
    for cached in (*prefix.keys, *prefix.values):
        cached[:, :, 0] += 1
    assert not torch.allclose(head(*chunk, prefix), before, atol=1e-3)


def test_a_sample_without_an_image_is_finite_with_its_gradients(head, prefix, chunk):
    prefix.hidden.requires_grad_()
    velocity = head(*chunk, prefix)
    velocity.square().sum().backward()
    assert velocity.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert prefix.hidden.grad is None or prefix.hidden.grad.isfinite().all()


def test_flow_loss_counts_each_samples_own_dimensions():
    velocity, target = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    mask = torch.zeros(2, 3, 4)
    mask[0, :, :2], mask[1, :, :4] = 1, 1
    velocity[0, :, 2:] = 100.0  # padding of sample 0: must not count
    velocity[1, :, 3] = 2.0
    pad = torch.tensor([[False, False, True], [False, False, False]])
    assert flow_loss(velocity, target, mask, pad).item() == pytest.approx((0 + 4 * 3 / 12) / 2)


def test_flow_loss_of_the_public_code_takes_the_width_of_sample_0():
    velocity, target = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    mask = torch.zeros(2, 3, 4)
    mask[0, :, :2], mask[1, :, :4] = 1, 1
    velocity[1, :, 1] = 2.0
    velocity[1, :, 3] = 100.0  # beyond the width of sample 0
    pad = torch.tensor([[False, False, True], [False, False, False]])
    assert flow_loss(velocity, target, mask, pad, "prts").item() == pytest.approx(4 * 3 / (5 * 2))
    assert flow_loss(velocity, target, compat="prts").item() == pytest.approx((4 * 3 + 100.0**2 * 3) / 24)


def test_padded_dimensions_carry_noise_under_prts_only():
    noise, mask = torch.ones(1, 2, 3), torch.tensor([1.0, 1.0, 0.0]).expand(1, 2, 3)
    assert mask_noise(noise, mask).tolist() == mask.tolist()
    assert mask_noise(noise, mask, "prts") is noise


def test_time_favours_noise():
    time = draw_time(20_000, torch.Generator().manual_seed(0))
    assert time.min() >= 0 and time.max() <= 1
    assert time.mean().item() == pytest.approx(0.4, abs=0.02)  # mean of Beta(1.5, 1) is 0.6


def test_the_kind_chooses_the_head_of_a_configuration():
    assert check(ModelConfig, {}, "x").expert == MotConfig()
    assert check(ModelConfig, {"expert": {"num_heads": 2}}, "x").expert == MotConfig(num_heads=2)
    assert check(ModelConfig, {"expert": {"kind": "dit", "num_layers": 6}}, "x").expert == DitConfig(num_layers=6)
    with pytest.raises(ConfigError, match="num_layer: unknown key; did you mean 'num_layers'"):
        check(ModelConfig, {"expert": {"kind": "dit", "num_layer": 6}}, "x")
    with pytest.raises(ConfigError, match="'mot', 'dit'"):
        check(ModelConfig, {"expert": {"kind": "moe"}}, "x")


@pytest.mark.parametrize("draws", [1, 3])
def test_draws_side_by_side_are_those_of_a_prompt_copied_for_each(head, prefix, draws):
    """Velocities, and the gradients of everything that the head reads."""
    torch.manual_seed(3)
    x, mask = torch.randn(draws * SAMPLES, STEPS, WIDTH), torch.ones(draws * SAMPLES, STEPS, WIDTH)
    time = torch.rand(draws * SAMPLES)
    reads = [*prefix.keys, *prefix.values, prefix.hidden]

    def outcome(of_prefix):
        for tensor in reads:
            tensor.requires_grad_().grad = None
        head.zero_grad()
        velocity = head(x, mask, time, of_prefix)
        velocity.square().sum().backward()
        return [velocity, *(t.grad for t in (*reads, *head.parameters()))]

    once = outcome(prefix)
    copied = outcome(prefix.map(lambda y: y.repeat_interleave(draws, dim=0)))
    for ours, theirs in zip(once, copied, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
