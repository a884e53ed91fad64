"""The contrastive objective: its optimum is the theory's, same-task samples are no negatives, one task is refused."""

from __future__ import annotations

import math

import pytest
import torch

from prts_core.errors import DataError
from prts_core.models.heads.contrastive.loss import contrastive_loss


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


def test_language_to_state_term_meets_its_floor_at_the_theorys_optimum():
    """With phi . psi = log discount the second term equals the entropy of its targets: no lower value exists."""
    gamma, length = 0.8, 4
    weight = (gamma ** torch.arange(length - 1, -1, -1).float()).repeat(2)
    task = torch.arange(2).repeat_interleave(length)
    phi = torch.full((2 * length, 2), -30.0)  # far below on the other goal's axis
    phi[torch.arange(2 * length), task] = weight.log()
    psi = torch.eye(2)[task]
    _, parts = contrastive_loss(phi, psi, torch.tensor(0.0), weight, task)
    share = weight[:length] / weight[:length].sum()
    assert parts["crl_l_to_sa"].item() == pytest.approx(-(share * share.log()).sum().item(), abs=1e-4)
    _, flat = contrastive_loss(phi.clamp(max=-1.0), psi, torch.tensor(0.0), weight, task)
    assert flat["crl_l_to_sa"] > parts["crl_l_to_sa"] + 0.01


def test_same_task_is_no_negative():
    torch.manual_seed(0)
    phi, psi, task = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    first_only = torch.tensor([1.0, 0, 0, 0])

    def loss_of_sample_0(goals):
        return contrastive_loss(phi, goals, torch.tensor(0.0), first_only, task)[1]["crl_sa_to_l"].item()

    same, other = psi.clone(), psi.clone()
    same[1] *= 50  # a goal of the same task
    other[2] *= 50  # a goal of another task
    assert loss_of_sample_0(same) == pytest.approx(loss_of_sample_0(psi), rel=1e-6)
    assert loss_of_sample_0(other) != pytest.approx(loss_of_sample_0(psi), rel=1e-2)


def test_one_task_is_refused():
    with pytest.raises(DataError, match="only one task"):
        contrastive_loss(
            torch.randn(3, 2), torch.randn(3, 2), torch.tensor(0.0), torch.ones(3), torch.zeros(3, dtype=torch.int64)
        )
