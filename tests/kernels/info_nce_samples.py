"""Samples for the tests of InfoNCE, and what a call gives on them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prts_kernels.info_nce import info_nce

TERMS = (0.7, 1.3)


def samples(
    count: int,
    tasks: int = 3,
    dim: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    norm: float = 1.0,
    failed: float = 0.0,
) -> list[Tensor]:
    """phi, psi, log_scale, log_weight, task_id; the first task is a sample's own as often as not."""
    rng = torch.Generator().manual_seed(seed)
    phi, psi = (norm * F.normalize(torch.randn(count, dim, generator=rng, dtype=dtype), dim=1) for _ in range(2))
    ids = torch.randint(-(2**62), 2**62, (tasks,), generator=rng)
    task_id = ids[torch.randint(0, tasks, (count,), generator=rng) * torch.randint(0, 2, (count,), generator=rng)]
    log_weight = torch.randint(0, 100, (count,), generator=rng).to(dtype) * math.log(0.98)
    log_weight = log_weight.masked_fill(torch.rand(count, generator=rng) < failed, -torch.inf)
    log_scale = torch.tensor(1.6, dtype=dtype)
    return [phi.requires_grad_(), psi.requires_grad_(), log_scale.requires_grad_(), log_weight, task_id]


def outcome(inputs: list[Tensor], **how: object) -> list[Tensor]:
    """loss, loss_sa_to_goal, loss_goal_to_sa, accuracy and the gradients of phi, psi and log_scale."""
    result = info_nce(*inputs, terms=TERMS, logsumexp_weight=0.1, **how)  # type: ignore[arg-type]
    return [x.detach() for x in result] + list(torch.autograd.grad(result.loss, inputs[:3]))
