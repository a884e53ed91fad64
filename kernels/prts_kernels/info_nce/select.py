"""The operation `info_nce` and the choice of its implementation by name.

Every implementation module has the same two functions, `unsupported_reason` and `forward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prts_kernels.info_nce.processes import ALONE, Processes
from prts_kernels.registry import implementation

# name -> module. `reference` is the specification and holds several N x N matrices.
IMPLEMENTATIONS: dict[str, str] = {
    "reference": "prts_kernels.info_nce.reference",
    "chunked": "prts_kernels.info_nce.chunked",
}
FEW = 256  # samples: below, the reference is faster by a fraction of a millisecond (fewer operations; CPU, 1 thread)


class InfoNce(NamedTuple):
    """loss: the weighted sum. loss_sa_to_goal, loss_goal_to_sa: its two terms before their weights. accuracy: the share
    of samples whose own goal scores higher than every goal of another task (a tie is a miss). Only loss has a gradient.
    """

    loss: Tensor
    loss_sa_to_goal: Tensor
    loss_goal_to_sa: Tensor
    accuracy: Tensor


def info_nce(
    phi: Tensor,
    psi: Tensor,
    log_scale: Tensor,
    log_weight: Tensor,
    task_id: Tensor,
    *,
    terms: tuple[float, float] = (1.0, 1.0),
    logsumexp_weight: float = 0.0,
    processes: Processes = ALONE,
    impl: str = "auto",
) -> InfoNce:
    """Discounted, symmetric InfoNCE between samples i and their goals (PRTS, arXiv:2604.27472, contrastive objective).

    With s_ij = exp(log_scale) phi_i . psi_j and w = exp(log_weight):
        loss_sa_to_goal = mean_i w_i (r_i - s_ii)         r_i = log sum_j exp s_ij over j = i and all j of other tasks
        loss_goal_to_sa = mean_i [w_i > 0] (c_i - sum_j q_ij s_ji)    c_i = log sum_j exp s_ji
        q_ij = w_j / sum of w over i's task, in the log domain: however small they all are
        loss = terms[0] loss_sa_to_goal + terms[1] loss_goal_to_sa + logsumexp_weight mean_i r_i^2
    phi, psi: (n, E) the samples of this process. log_weight, task_id: (N,) of all processes, constants; ids are
    integers. A sample of log weight -inf is a negative for the others and has no goal of its own. All arithmetic is in
    fp32, autocast or not (fp64 for fp64 embeddings).
    processes: how the samples are spread. Every process gets the joint loss and the gradients of its own samples;
    the gradient of log_scale is the part that its own samples (rows of s) give: sum it over processes.
    impl: "auto" or one of IMPLEMENTATIONS. Differentiable once.
    ValueError: shapes that do not fit together, no samples, an unknown `impl`, or one that cannot compute these.
    """
    _check(phi, psi, log_scale, log_weight, task_id, processes)
    name = impl
    if impl == "auto":
        name = "reference" if len(phi) < FEW and processes.world == 1 else "chunked"
    module = implementation("info_nce", IMPLEMENTATIONS, name)
    reason = module.unsupported_reason(phi, processes)
    if reason:
        raise ValueError(f"impl={name!r} cannot compute this: {reason}. impl='auto' picks one that can.")
    kind = torch.float64 if phi.dtype == psi.dtype == torch.float64 else torch.float32
    phi, psi, log_scale, log_weight = (x.to(kind) for x in (phi, psi, log_scale, log_weight))
    with torch.autocast(phi.device.type, enabled=False):
        # Not 0 where a weight is merely too small for a float: 0 says that the sample did not reach its goal.
        weight = log_weight.exp().clamp(min=torch.finfo(kind).tiny).where(log_weight > -torch.inf, 0.0)
        share = task_shares(log_weight, task_id)
        found = module.forward(phi, psi, log_scale, weight, share, task_id, terms, logsumexp_weight, processes)
        return InfoNce(*found)


def task_shares(log_weight: Tensor, task_id: Tensor) -> Tensor:
    """(N,) exp(log_weight) over its sum in the sample's task, found in the log domain; 0 where all of them are -inf."""
    # As `unique` numbers them, but for how many there are, which a GPU would have to tell the host: at most N.
    ids, order = task_id.sort(stable=True)
    number = torch.nn.functional.pad((ids[1:] != ids[:-1]).long(), (1, 0)).cumsum(0)
    task = torch.empty_like(order).scatter_(0, order, number)
    top = torch.full_like(log_weight, -torch.inf).scatter_reduce(0, task, log_weight, "amax")
    relative = (log_weight - top.clamp(min=torch.finfo(log_weight.dtype).min)[task]).exp()
    total = torch.zeros_like(relative).index_add_(0, task, relative)
    return relative / total.clamp(min=torch.finfo(total.dtype).tiny)[task]


def _check(phi: Tensor, psi: Tensor, log_scale: Tensor, weight: Tensor, task_id: Tensor, processes: Processes) -> None:
    total = processes.total(len(phi))
    good = (
        phi.ndim == 2
        and phi.shape == psi.shape
        and weight.shape == task_id.shape == (total,)
        and log_scale.numel() == 1
        and total > 0
    )
    if not good:
        raise ValueError(
            "info_nce takes phi and psi (n, E), log_scale (), log_weight and task_id (N,) with N > 0 samples of all "
            f"processes; found phi {tuple(phi.shape)}, psi {tuple(psi.shape)}, log_scale {tuple(log_scale.shape)}, "
            f"log_weight {tuple(weight.shape)}, task_id {tuple(task_id.shape)}, {total} samples"
        )
    if weight.requires_grad or task_id.is_floating_point():
        raise ValueError("info_nce: log_weight is a constant (no gradient), task_id holds integers")
