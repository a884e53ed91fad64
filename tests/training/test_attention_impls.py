"""A whole training step costs the same loss and gradients with every implementation of role attention."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from prts_core.config.checked_yaml import check
from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError
from prts_core.models import attention
from prts_core.models.attention import choose_implementation
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.losses import prts_loss
from prts_core.training.recompute import recompute_activations
from prts_core.training.trainer import Trainer
from prts_kernels.role_attention import IMPLEMENTATIONS, role_attention
from tests.training.runs import CONFIG, batches, network, text_tokenizer, toy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return text_tokenizer()


def step(tokenizer: TextTokenizer, impl: str, pack_length: int, recompute: bool, grad: bool = True):
    """Loss and gradients of the first batch: behaviour cloning, flow matching and contrastive RL at once."""
    config = replace(CONFIG, pack_length=pack_length, pack_window=24)
    model = network(tokenizer).train()
    choose_implementation(model.language_model, impl)
    if recompute:
        recompute_activations(model)
    source = batches([toy(tokenizer)], config)
    batch = next(source.batches(source.start()))
    assert batch.tokens.packed == bool(pack_length) and bool((batch.tokens.state_action_index >= 0).any())
    with torch.set_grad_enabled(grad):
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


def test_a_recipe_names_exactly_the_implementations_there_are() -> None:
    assert get_args(get_type_hints(TrainConfig)["attention"]) == ("auto", *IMPLEMENTATIONS)
    with pytest.raises(ConfigError, match=r"reference.*sdpa.*flex.*split.*triton"):
        check(TrainConfig, {"attention": "flash"}, "recipe.yaml")
    with pytest.raises(ValueError, match=r"'flx'.*did you mean 'flex'"):
        choose_implementation(network(text_tokenizer()).language_model, "flx")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple]:
    """(impl, dtypes of q, k and v) of every call of role attention."""
    calls = set()

    def spy(q, k, v, mask, **options):
        calls.add((options["impl"], q.dtype, k.dtype, v.dtype))
        return role_attention(q, k, v, mask, **options)

    monkeypatch.setattr(attention, "role_attention", spy)
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_recipes_choice_and_one_dtype_reach_every_layer(tokenizer, precision: str, seen: set[tuple]) -> None:
    config = replace(CONFIG, attention="split", precision=precision)
    trainer = Trainer(network(tokenizer), batches([toy(tokenizer)], config), config, 7)
    trainer.step(next(trainer._steps()), 0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert seen == {("split", dtype, dtype, dtype)}


def test_a_model_in_bf16_attends_in_bf16(tokenizer: TextTokenizer, seen: set[tuple]) -> None:
    source = batches([toy(tokenizer)], CONFIG)
    tokens = next(source.batches(source.start())).tokens
    assert network(tokenizer).bfloat16().encode(tokens).hidden.isfinite().all()
    assert seen == {("auto", *[torch.bfloat16] * 3)}


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
