"""Discounted, symmetric InfoNCE between state-action embeddings and language goals. Knows no network and no data.

Source: PRTS (arXiv:2604.27472), contrastive RL objective. With s_ij = exp(scale) phi_i . psi_j and w_i = gamma^(T_i
- t_i):
    L_sa->l = -mean_i w_i log softmax_j(s_ij)[i]           negatives: goals of other tasks only (false-negative mask)
    L_l->sa = -mean_i sum_j q_ij log softmax_j(s_ji)       q_ij = w_j / sum_j' w_j' over samples j that share goal i
At the optimum phi(s, a) . psi(l) = log Q_l(s, a) + C(l): along a demonstration it rises by -log gamma a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.errors import DataError


def contrastive_loss(
    phi: Tensor,
    psi: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    task_id: Tensor,
    logsumexp_weight: float = 0.0,
    terms: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, dict[str, Tensor]]:
    """phi, psi (N, E); weight (N,) discounts in (0, 1]; task_id (N,) int64 -> (loss, metrics).

    terms: weights of L_sa->l and L_l->sa. Theorem 1 speaks of the second alone; the first adds goal discrimination and
    bends the slope, but keeps the order. The metrics are the terms before their weights.

    Raises DataError when all samples share one task: there is nothing to contrast.
    """
    logits = log_scale.exp() * phi @ psi.T
    same = task_id[:, None] == task_id[None, :]
    if bool(same.all()):
        raise DataError(
            "A contrastive batch holds only one task, so there are no negatives",
            field="weights.contrastive",
            found=f"{len(task_id)} samples of one instruction",
            expected="at least two different instructions in the data",
            cure="add tasks, or set weights.contrastive to 0",
        )
    own = torch.eye(len(phi), dtype=torch.bool, device=phi.device)
    to_goal = logits.masked_fill(same & ~own, float("-inf"))
    normalizer = to_goal.logsumexp(1)
    loss_to_goal = (weight * (normalizer - logits.diagonal())).mean()
    share = torch.where(same, weight[None, :], 0.0)
    share = share / share.sum(1, keepdim=True)
    loss_to_state = -(share * logits.T.log_softmax(1)).sum(1).mean()
    loss = terms[0] * loss_to_goal + terms[1] * loss_to_state
    if logsumexp_weight:
        loss = loss + logsumexp_weight * normalizer.square().mean()
    accuracy = (to_goal.argmax(1) == torch.arange(len(phi), device=phi.device)).float().mean()
    return loss, {"crl_sa_to_l": loss_to_goal.detach(), "crl_l_to_sa": loss_to_state.detach(), "crl_accuracy": accuracy}
