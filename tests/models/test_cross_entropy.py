"""Cross-entropy by slices of the vocabulary is torch's own, with every gradient, and holds one slice of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prts_core.models import cross_entropy
from prts_core.models.cross_entropy import head_logits, token_cross_entropy
from prts_core.training.adapters import GrownEmbedding


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(cross_entropy, "SLICE", 64)


def plain(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = head_logits(head, hidden).float()
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels


def outcome(losses_of: Any, hidden: Tensor, head: nn.Module, labels: Tensor, weight: Tensor) -> list[Tensor | None]:
    """Losses, right guesses and gradients where every label weighs something of its own and the table is tied."""
    hidden.grad = None
    head.zero_grad(set_to_none=True)
    losses, right = losses_of(hidden, head, labels)
    tied = head(labels.flip(0)).square().sum()
    (losses @ weight + tied).backward()
    return [losses.detach(), right, hidden.grad, *(p.grad for p in head.parameters())]


def case(labels: int, vocabulary: int, width: int, grown: int | None, frozen: bool, seed: int) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    head: nn.Module = nn.Embedding(vocabulary, width)
    if grown is not None:
        head.weight.requires_grad_(not frozen)
        head = GrownEmbedding(head, torch.randperm(vocabulary)[:grown].tolist())
        head.rows.data.mul_(2)
    hidden = torch.randn(labels, width, requires_grad=True)
    return hidden, head, torch.randint(0, vocabulary, (labels,)), torch.randn(labels)


@given(
    labels=st.integers(1, 40),
    vocabulary=st.integers(2, 90),
    width=st.integers(1, 9),
    grown=st.none() | st.integers(1, 30),
    frozen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_losses_guesses_and_gradients_are_torchs_own(labels, vocabulary, width, grown, frozen, seed):
    made = case(labels, vocabulary, width, None if grown is None else min(grown, vocabulary), frozen, seed)
    for ours, theirs in zip(outcome(token_cross_entropy, *made), outcome(plain, *made), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def test_in_bf16_the_rounding_is_that_of_the_plain_one():
    hidden, head, labels, weight = case(30, 90, 16, None, False, 0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(token_cross_entropy, hidden, head, labels, weight)
        theirs = outcome(plain, hidden, head, labels, weight)
    assert ours[0].dtype == torch.float32 and ours[2].dtype == ours[3].dtype == torch.float32
    for mine, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, own, atol=2e-2, rtol=2e-2)


def test_gradients_are_exact():
    hidden, head, labels, _ = case(9, 30, 3, None, False, 1)
    table = head.weight.detach().double().requires_grad_()

    def losses(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy._SlicedCrossEntropy.apply(x, labels, weight, None, None, None)[0]

    assert torch.autograd.gradcheck(losses, (hidden.detach().double().requires_grad_(), table))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_more_than_a_slice_of_logits_is_held_and_a_frozen_head_gets_no_gradient():
    hidden, head, labels, _ = case(16, 400, 4, 3, True, 2)
    with Largest() as seen:
        token_cross_entropy(hidden, head, labels)[0].sum().backward()
    assert seen.elements <= cross_entropy.SLICE
    assert head.table.weight.grad is None and head.rows.grad is not None
