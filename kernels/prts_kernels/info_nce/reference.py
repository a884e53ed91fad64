"""Eager InfoNCE over the whole matrix of scores: the specification of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from prts_kernels.info_nce.processes import Processes


def unsupported_reason(phi: Tensor, processes: Processes) -> str | None:
    """Why this cannot be computed here, or None."""
    return "it computes in one process" if processes.world > 1 else None


def forward(
    phi: Tensor,
    psi: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    share: Tensor,
    task_id: Tensor,
    terms: tuple[float, float],
    logsumexp_weight: float,
    processes: Processes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As select.info_nce, in the dtype of phi."""
    logits = log_scale.exp() * phi @ psi.T
    same = task_id[:, None] == task_id[None, :]
    own = torch.eye(len(phi), dtype=torch.bool, device=phi.device)
    masked = logits.masked_fill(same & ~own, float("-inf"))
    normalizer = masked.logsumexp(1)
    loss_sa_to_goal = (weight * (normalizer - logits.diagonal())).mean()
    of_task = torch.where(same & (weight > 0)[:, None], share[None, :], 0.0)
    loss_goal_to_sa = -(of_task * logits.T.log_softmax(1)).sum(1).mean()
    loss = terms[0] * loss_sa_to_goal + terms[1] * loss_goal_to_sa
    if logsumexp_weight:
        loss = loss + logsumexp_weight * normalizer.square().mean()
    accuracy = (logits.diagonal() > logits.masked_fill(same, float("-inf")).amax(1)).to(phi.dtype).mean()
    return loss, loss_sa_to_goal.detach(), loss_goal_to_sa.detach(), accuracy
