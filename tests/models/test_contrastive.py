"""The contrastive objective: its floor is the theory's, same-task samples are no negatives, one task counts nothing.

What training to its optimum gives stands in tests/training/test_theory.py.
"""

from __future__ import annotations

import pytest
import torch

from prts_core.models.heads.contrastive.loss import contrastive_loss


def test_language_to_state_term_meets_its_floor_at_the_theorys_optimum():
    """With phi . psi = log discount the second term equals the entropy of its targets: no lower value exists."""
    gamma, length = 0.8, 4
    weight = (gamma ** torch.arange(length - 1, -1, -1).float()).repeat(2)
    task = torch.arange(2).repeat_interleave(length)
    phi = torch.full((2 * length, 2), -30.0)  # far below on the other goal's axis
    phi[torch.arange(2 * length), task] = weight.log()
    psi = torch.eye(2)[task]
    _, parts = contrastive_loss(phi, psi, torch.tensor(0.0), weight.log(), task)
    share = weight[:length] / weight[:length].sum()
    assert parts["crl_l_to_sa"].item() == pytest.approx(-(share * share.log()).sum().item(), abs=1e-4)
    _, flat = contrastive_loss(phi.clamp(max=-1.0), psi, torch.tensor(0.0), weight.log(), task)
    assert flat["crl_l_to_sa"] > parts["crl_l_to_sa"] + 0.01


def test_same_task_is_no_negative():
    torch.manual_seed(0)
    phi, psi, task = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    first_only = torch.tensor([1.0, 0, 0, 0]).log()

    def loss_of_sample_0(goals):
        return contrastive_loss(phi, goals, torch.tensor(0.0), first_only, task)[1]["crl_sa_to_l"].item()

    same, other = psi.clone(), psi.clone()
    same[1] *= 50  # a goal of the same task
    other[2] *= 50  # a goal of another task
    assert loss_of_sample_0(same) == pytest.approx(loss_of_sample_0(psi), rel=1e-6)
    assert loss_of_sample_0(other) != pytest.approx(loss_of_sample_0(psi), rel=1e-2)


def test_one_task_counts_nothing_and_reaches_everything():
    reads = [
        torch.randn(3, 2, requires_grad=True),
        torch.randn(3, 2, requires_grad=True),
        torch.zeros((), requires_grad=True),
    ]
    loss, _ = contrastive_loss(*reads, torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and all(x.grad is not None and not x.grad.any() for x in reads)
