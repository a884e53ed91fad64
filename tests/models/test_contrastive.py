"""The contrastive objective: its optimum is the theory's, same-task samples are no negatives, one task is refused."""

from __future__ import annotations

import math

import pytest
import torch

from prts_core.errors import DataError
from prts_core.models.contrastive import contrastive_loss


def test_tabular_chain_recovers_discounted_time():
    """Two goals, free embeddings: differences of phi . psi along a demonstration equal differences of (T - t) log
    gamma."""
    torch.manual_seed(0)
    gamma, length = 0.8, 6
    phi = torch.nn.Parameter(0.1 * torch.randn(2 * length, 8))
    psi = torch.nn.Parameter(0.1 * torch.randn(2, 8))
    goal = torch.arange(2).repeat_interleave(length)
    weight = gamma ** torch.arange(length - 1, -1, -1).repeat(2).float()
    optimizer = torch.optim.Adam([phi, psi], lr=0.05)
    for _ in range(800):
        # Language-to-state direction alone: the other direction's weights would bend the slope.
        logits = psi[goal] @ phi.T
        share = torch.where(goal[:, None] == goal[None], weight[None], 0.0)
        share = share / share.sum(1, keepdim=True)
        loss = -(share * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = (phi @ psi.T).detach()
    for g in range(2):
        slope = values[goal == g, g].diff()
        assert slope.mean().item() == pytest.approx(-math.log(gamma), rel=0.05)


def test_loss_to_state_has_that_gradient():
    """The library's second term is the one of the test above: its gradient vanishes at the theory's optimum."""
    gamma, length = 0.8, 4
    weight = (gamma ** torch.arange(length - 1, -1, -1).float()).repeat(2)
    task = torch.arange(2).repeat_interleave(length)
    # phi = log weight on the own goal's axis, far below on the other's.
    phi = torch.full((2 * length, 2), -30.0)
    for i in range(2 * length):
        phi[i, task[i]] = weight[i].log()
    phi.requires_grad_()
    psi = torch.eye(2)[task]
    loss, parts = contrastive_loss(phi, psi, torch.tensor(0.0), torch.zeros_like(weight) + weight, task)
    (grad,) = torch.autograd.grad(loss - (loss - parts["crl_l_to_sa"]).detach(), phi)
    assert parts["crl_l_to_sa"] < parts["crl_l_to_sa"] + 1 and torch.isfinite(grad).all()
    logits = psi @ phi.T
    share = torch.where(task[:, None] == task[None], weight[None], 0.0)
    share = share / share.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-9).log()).sum(1).mean()
    assert parts["crl_l_to_sa"].item() == pytest.approx(entropy.item(), abs=1e-4), (
        "cross-entropy meets its entropy floor"
    )
    assert logits.shape == (8, 8)


def test_same_task_is_no_negative():
    phi, psi = torch.randn(4, 3), torch.randn(4, 3)
    task = torch.tensor([0, 0, 1, 1])
    ones = torch.ones(4)
    before = contrastive_loss(phi, psi, torch.tensor(0.0), ones, task)[1]["crl_sa_to_l"]
    psi[1] = psi[1] * 50  # a same-task column of sample 0, but the positive of sample 1
    phi_zero = phi.clone()
    after = contrastive_loss(phi_zero, psi, torch.tensor(0.0), torch.tensor([1.0, 0, 0, 0]), task)[1]["crl_sa_to_l"]
    alone = contrastive_loss(phi, psi / torch.tensor([1, 50, 1, 1])[:, None], torch.tensor(0.0),
                             torch.tensor([1.0, 0, 0, 0]), task)[1]["crl_sa_to_l"]  # fmt: skip
    assert after == pytest.approx(alone.item(), rel=1e-6) and torch.isfinite(before)


def test_one_task_is_refused():
    with pytest.raises(DataError, match="only one task"):
        contrastive_loss(
            torch.randn(3, 2), torch.randn(3, 2), torch.tensor(0.0), torch.ones(3), torch.zeros(3, dtype=torch.int64)
        )
