"""The network's forward and backward read nothing back from the device: a GPU never waits for the host.

On a CPU the operations that would wait are refused instead: those that read a value, and those whose result has a size
that only the values tell. What lies on the host anyway (grids, counts) is read before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prts_core.config.model import DitConfig
from prts_core.models import cross_entropy
from prts_core.models.attention import choose_implementation
from prts_core.models.heads.contrastive.loss import contrastive_loss
from prts_core.models.heads.flow.loss import flow_loss, mix_noise
from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Tokens
from prts_core.text import prompt
from prts_core.text.collate import collate, packed, patches
from prts_core.text.sequence import ImageTokens, SequenceBuilder

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.equal.default,
}


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) else ()
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        assert func not in WAITS and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_what_waits_is_seen():
    mask = torch.tensor([True, False])
    for wait in (lambda: mask.any().item(), lambda: mask.nonzero(), lambda: bool(mask[0]), lambda: torch.ones(2)[mask]):
        with pytest.raises(AssertionError, match="waits"), Refusing():
            wait()


def tokens_of(tokenizer, samples, tiny, pack: bool) -> Tokens:
    """Two cameras of unlike sizes."""
    views = (ImageTokens("Camera top", 2, 2), ImageTokens("Camera wrist", 2, 4))
    builder = SequenceBuilder(tokenizer, views)
    sequences = [builder.sequence(s, response=True, contrastive=True) for s in samples]
    sequences[0] = builder.sequence(samples[0], response=True, contrastive=False)  # so that rows are padded
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 16 * v.columns, 3), dtype=np.uint8) for _ in samples for v in views]
    lengths = [len(s) for s in sequences]
    place = packed([lengths[:2], lengths[2:]], sum(lengths)) if pack else None
    return collate(sequences, *patches(images, tiny.vision.patch_size, tiny.vision.merge_size), place=place)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("head", ["mot", "dit"])
def test_forward_and_backward_wait_for_nothing(monkeypatch, tiny, tokenizer, samples, pack, head):
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "SLICE", 4096)
    expert = tiny.expert if head == "mot" else DitConfig(num_layers=2, num_heads=2, head_dim=8, output_dim=16)
    model = PrtsModel(replace(tiny, expert=expert), len(tokenizer), tokenizer.id(prompt.IMAGE_PAD)).train()
    choose_implementation(model.language_model, "reference")  # on a CPU others look at padding
    tokens = tokens_of(tokenizer, samples, tiny, pack)
    actions, noise, time = torch.randn(6, 4, 8), torch.randn(6, 4, 8), torch.rand(6)
    mask = torch.ones(6, 4, 8)

    def step() -> None:
        encoded = model.encode(tokens)
        losses, _ = model.token_losses(encoded)
        x, target = mix_noise(actions, noise, time)
        flow = sum(
            flow_loss(model.velocity(encoded.prefix(), x, mask, time), target, mask, compat=compat)
            for compat in ("none", "prts")
        )
        phi, psi = model.embed_state_actions(encoded)[1:], model.embed_goals(encoded)[1:]
        task, weight = torch.tensor([4, 1]), torch.tensor([-1.0, -2.0])
        contrastive, _ = contrastive_loss(phi, psi, model.log_scale, weight, task)
        (losses.mean() + flow + contrastive).backward()

    step()  # what is derived from grids and masks once, of which a GPU gets a copy with the batch
    with Refusing():
        step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.numel())
