"""The contrastive objective on a batch: `prts_kernels.info_nce`, which says the formula, with the project's names.

At the optimum phi(s, a) . psi(l) = log Q_l(s, a) + C(l): along a demonstration it rises by -log gamma a row.
"""

from __future__ import annotations

from torch import Tensor

from prts_kernels.info_nce import ALONE, Processes, info_nce


def contrastive_loss(
    phi: Tensor,
    psi: Tensor,
    log_scale: Tensor,
    log_weight: Tensor,
    task_id: Tensor,
    logsumexp_weight: float = 0.0,
    terms: tuple[float, float] = (1.0, 1.0),
    processes: Processes = ALONE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """phi, psi (n, E); log_weight (N,): steps log gamma, or -inf of a sample whose goal was not reached; task_id (N,)
    int64 -> (loss, metrics).

    terms: weights of L_sa->l and L_l->sa. Theorem 1 speaks of the second alone; the first adds goal discrimination and
    bends the slope, but keeps the order. The metrics are the terms before their weights.
    processes: how the N samples of the joint batch lie over processes, n of them here; all get the joint loss.

    Where all samples share one task there is nothing to contrast: the loss is 0, with gradients of 0. Nothing is read
    back from a GPU.
    """
    loss, loss_sa_to_goal, loss_goal_to_sa, accuracy = info_nce(
        phi, psi, log_scale, log_weight, task_id, terms=terms, logsumexp_weight=logsumexp_weight, processes=processes
    )
    several = (task_id != task_id[0]).any()
    metrics = {"crl_sa_to_l": loss_sa_to_goal, "crl_l_to_sa": loss_goal_to_sa, "crl_accuracy": accuracy}
    return loss * several, metrics
