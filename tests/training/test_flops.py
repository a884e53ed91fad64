"""FLOPs by formula against what torch counts while the network runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prts_core.config.model import DitConfig, TokensConfig
from prts_core.config.train import LoraConfig, LossWeights, TrainConfig
from prts_core.models.attention import choose_implementation
from prts_core.training.flops import Counts, counts_of, forward_flops, peak_flops, training_flops
from prts_core.training.losses import prts_loss
from prts_core.training.meter import step_flops
from tests.training.runs import CONFIG, MODEL, batches, network, text_tokenizer, toy

FLOW = LossWeights(fast=0.0, text=0.0, flow=1.0, contrastive=0.0)
DIT = DitConfig(num_layers=3, num_heads=2, head_dim=16, output_dim=24, alternate=False)
TOKENS = TokensConfig(bins=32)


def counted(call) -> float:
    """As torch counts them; attention by explicit products, since it counts none of a CPU's fused kernels."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@pytest.fixture(scope="module")
def tokenizer():
    return text_tokenizer()


@pytest.mark.parametrize(("head", "draws"), [("mot", 1), ("dit", 1), ("dit", 3), ("tokens", 1)])
def test_every_part_is_what_torch_counts(tokenizer, head, draws):
    """Of a MoT's draws, which lie side by side behind a mask, torch counts the pairs that are masked, too."""
    config = MODEL if head == "mot" else replace(MODEL, expert=DIT if head == "dit" else TOKENS)
    model = network(tokenizer, config)
    choose_implementation(model.language_model, "reference")
    batch = next(batches([toy(tokenizer)], replace(CONFIG, batch_size=1)).batches({"sample": 0}))
    tokens = batch.tokens
    assert tokens.count == tokens.ids.numel(), "the test wants no padding, which torch counts and we do not"
    dense = replace(counts_of(tokens, draws), pairs=tokens.count**2)  # the reference implementation skips nothing
    said = forward_flops(config, dense, len(tokenizer))

    with torch.no_grad():
        vision = counted(lambda: model.visual(tokens.pixels, grid_thw=tokens.grid, return_dict=True))
        whole = counted(lambda: model.encode(tokens))
        encoded = model.encode(tokens)
        logits = counted(lambda: model.token_losses(encoded))
        contrastive = counted(lambda: (model.embed_goals(encoded), model.embed_state_actions(encoded)))
        prefix = encoded.prefix()
        x, time = batch.actions.repeat_interleave(draws, 0), torch.zeros(draws)
        if head == "tokens":
            action = counted(lambda: model.action_logits(prefix, torch.ones_like(x)))
        else:
            action = counted(lambda: model.velocity(prefix, x, torch.ones_like(x), time))
    assert said["vision"] == vision
    assert said["language"] == whole - vision
    assert said["logits"] == logits and said["contrastive"] == contrastive
    assert said["action"] == action


def test_backward_is_twice_the_forward(tokenizer):
    model = network(tokenizer).train()
    choose_implementation(model.language_model, "reference")
    config = replace(CONFIG, batch_size=1, weights=LossWeights(fast=1.0, flow=1.0, contrastive=0.0))
    batch = next(batches([toy(tokenizer)], config).batches({"sample": 0}))
    dense = replace(counts_of(batch.tokens, config.flow_samples), pairs=batch.tokens.count**2)
    said = sum(training_flops(forward_flops(MODEL, dense, len(tokenizer))).values())
    step = counted(lambda: prts_loss(model, batch, config, torch.Generator().manual_seed(0))[0].backward())
    assert said == pytest.approx(step, rel=0.03)  # pixels, times and noise need no gradient


def test_frozen_parts_count_less_and_counts_add_up():
    forward = forward_flops(
        MODEL, Counts(tokens=10, pairs=55, patches=16, patch_pairs=256, draws=2, context=10, prompt=20), 100
    )
    whole, lora = training_flops(forward), training_flops(forward, frozen={"language"}, cut={"vision"})
    assert lora["language"] == 2 / 3 * whole["language"] and lora["vision"] == whole["vision"] / 3
    assert Counts(tokens=2, labels=1) + Counts(tokens=3) == Counts(tokens=5, labels=1)


def test_a_visible_share_of_the_pairs_is_counted(tokenizer):
    batch = next(batches([toy(tokenizer)], replace(CONFIG, batch_size=4)).batches({"sample": 0}))
    counts = counts_of(batch.tokens, 1)
    assert counts.tokens <= batch.tokens.ids.numel() and counts.pairs == batch.tokens.mask.visible_pairs
    assert counts.contrasted == counts.draws == 4 and counts.patches == int(batch.tokens.grid.prod(1).sum())


def test_peaks_are_known_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("Intel Xeon") is None


@pytest.mark.parametrize(
    ("change", "vision", "language", "logits"),
    [
        ({}, 3, 3, 3),
        ({"insulate": True, "weights": FLOW}, 1, 1, 0),
        ({"freeze": ("llm", "vision", "merger"), "weights": FLOW}, 1, 1, 0),
        ({"freeze": ("llm", "vision", "merger")}, 1, 1, 1),
        ({"freeze": ("llm",)}, 3, 2, 2),
        ({"freeze": ("vision", "merger")}, 1, 3, 3),
        ({"lora": LoraConfig()}, 1, 2, 2),
    ],
)
def test_a_step_counts_the_gradients_that_it_takes(change, vision, language, logits):
    """In forwards: one more where a gradient passes through, one more where weights train."""
    work = Counts(tokens=10, pairs=55, patches=16, patch_pairs=256, labels=3, draws=2, context=10, prompt=20)
    forward, found = forward_flops(MODEL, work, 100), step_flops(MODEL, replace(TrainConfig(), **change), work, 100)
    assert [round(found[part] / forward[part]) for part in ("vision", "language", "logits")] == [
        vision,
        language,
        logits,
    ]
