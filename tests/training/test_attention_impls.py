"""A whole training step costs the same loss and gradients with every implementation of role attention."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prts_core.models.attention import implementation
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.losses import prts_loss
from prts_core.training.recompute import recompute_activations
from prts_kernels.role_attention import IMPLEMENTATIONS
from tests.training.runs import CONFIG, batches, network, text_tokenizer, toy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return text_tokenizer()


def step(tokenizer: TextTokenizer, impl: str, pack_length: int, recompute: bool, grad: bool = True):
    """Loss and gradients of the first batch: behaviour cloning, flow matching and contrastive RL at once."""
    config = replace(CONFIG, pack_length=pack_length, pack_window=24)
    model = network(tokenizer).train()
    if recompute:
        recompute_activations(model)
    source = batches([toy(tokenizer)], config)
    batch = next(source.batches(source.start()))
    assert batch.tokens.packed == bool(pack_length) and bool((batch.tokens.state_action_index >= 0).any())
    with implementation(impl), torch.set_grad_enabled(grad):
        loss, _ = prts_loss(model, batch, config, torch.Generator().manual_seed(0))
        if grad:
            loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("pack_length", [0, 300], ids=["padded", "packed"])
@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_the_step_is_the_same(tokenizer: TextTokenizer, impl: str, pack_length: int, recompute: bool) -> None:
    if (impl == "triton") != INTERPRETED:
        pytest.skip("triton runs here in its interpreter only, in a process of its own (below)")
    grad = impl != "flex"  # torch's FlexAttention has no backward on a CPU
    loss, gradients = step(tokenizer, impl, pack_length, recompute, grad)
    expected, expected_gradients = step(tokenizer, "reference", pack_length, recompute=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == (expected_gradients.keys() if grad else set())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_step_is_the_same_with_triton() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, "-k", "triton and packed and kept"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and "100%" in done.stdout, done.stdout + done.stderr
