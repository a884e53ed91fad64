"""InfoNCE that never holds the N x N scores: it walks chunks of rows, keeps O(N) numbers, recomputes in the backward.

Plain torch, any device; the same bits on every run (no atomics, fixed order of sums).

Why it is exact. The softmaxes enter the loss only through a log-sum-exp a row (r) and one a column (c). r is complete
once a row has met all columns; c is a running maximum and a running sum over chunks. So are the gradients: with P_ij =
exp(s_ij - r_i) over what row i is contrasted with, and C_ij = exp(s_ij - c_j),
    ds_ij = (t0 w_i + 2 lambda r_i) / N P_ij + t1 / N a_j (C_ij - q_i [same task]) - t0 w_i / N [i = j]
where q_i is i's share of its task's weight and a_j is 1 where w_j is not 0. Cost: four products of N x N x E (scores
twice, two gradients), where keeping the scores needs three; what it saves is some twenty passes over N x N through
memory.

Processes: rows are split, each process meets its own rows with all columns, so the work a process is N N / world. Only
psi is gathered; of the columns, a maximum and a sum a process are combined; the gradient of psi is reduce-scattered.

Legend: n own rows, N columns, B rows a chunk; x = exp(log_scale) phi.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prts_kernels.info_nce.processes import Processes

# Scores a chunk. CPU: 1 MB of fp32 stays in the cache (2^17 to 2^19 are about alike). Elsewhere 128 MB: long enough
# for full-speed products, and three such buffers are the whole extra memory.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**25


def unsupported_reason(phi: Tensor, processes: Processes) -> str | None:
    """Why this cannot be computed here, or None."""
    return None


@torch.compiler.disable  # once a step, and a loop over chunks: nothing for a compiler to gain
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
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As select.info_nce, in the dtype of phi. chunk: scores held at a time, at least one row of them."""
    chunk = chunk or CHUNK.get(phi.device.type, CHUNK_ELSEWHERE)
    return _InfoNce.apply(phi, psi, log_scale, weight, share, task_id, terms, logsumexp_weight, processes, chunk)


class _InfoNce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        phi: Tensor,
        psi: Tensor,
        log_scale: Tensor,
        weight: Tensor,
        share: Tensor,
        task_id: Tensor,
        terms: tuple[float, float],
        logsumexp_weight: float,
        processes: Processes,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = log_scale.exp()
        x, y = phi * scale, processes.gather(psi)
        n, total, start = len(x), len(y), processes.start(len(x))
        own = slice(start, start + n)
        w, q, task = weight[own], share[own], task_id[own]
        anchor = (weight > 0).to(x.dtype)
        size = max(1, min(n, chunk // total))
        scores, spare = x.new_empty(2, size, total).unbind()
        normalizer, diagonal, negative, positive = x.new_empty(4, n).unbind()
        column_top, column_sum = x.new_full((total,), float("-inf")), x.new_zeros(total)
        for begin in range(0, n, size):
            rows = slice(begin, min(begin + size, n))
            s = torch.mm(x[rows], y.T, out=scores[: rows.stop - begin])
            same = task[rows, None] == task_id
            member = spare[: len(s)].copy_(same).mul_(anchor)
            torch.linalg.vecdot(member, s, out=positive[rows])
            higher = torch.maximum(column_top, s.amax(0))
            exped = torch.sub(s, higher, out=spare[: len(s)]).exp_()
            column_sum.mul_((column_top - higher).exp_()).add_(exped.sum(0))
            column_top = higher
            mine = slice(start + begin, start + rows.stop)  # the chunk's own columns
            diagonal[rows] = s[:, mine].diagonal()
            s.masked_fill_(same, float("-inf"))
            torch.amax(s, 1, out=negative[rows])
            s[:, mine].diagonal().copy_(diagonal[rows])
            top = torch.maximum(negative[rows], diagonal[rows])[:, None]
            normalizer[rows] = s.sub_(top).exp_().sum(1).log_().add_(top[:, 0])
        parts = torch.stack(
            [
                (w * (normalizer - diagonal)).sum(),
                (q * positive).sum(),
                normalizer.square().sum(),
                (diagonal > negative).sum().to(x.dtype),
            ]
        )
        if processes.world > 1:
            stacked = processes.stack(torch.cat([parts, column_top, column_sum]))
            parts = stacked[:, :4].sum(0)
            tops, sums = stacked[:, 4 : 4 + total], stacked[:, 4 + total :]
            column_top = tops.amax(0)
            column_sum = (sums * (tops - column_top).exp()).sum(0)
        column = column_sum.log_().add_(column_top)
        loss_sa_to_goal, positives, squares, accuracy = (parts / total).unbind()
        loss_goal_to_sa = (column * anchor).mean() - positives
        loss = terms[0] * loss_sa_to_goal + terms[1] * loss_goal_to_sa
        if logsumexp_weight:
            loss = loss + logsumexp_weight * squares
        ctx.save_for_backward(x, y, w, task, task_id, scale, normalizer, column, q, anchor)
        ctx.terms, ctx.logsumexp_weight, ctx.processes = terms, logsumexp_weight, processes
        ctx.start, ctx.size, ctx.shape = start, size, log_scale.shape
        ctx.mark_non_differentiable(loss_sa_to_goal, loss_goal_to_sa, accuracy)
        return loss, loss_sa_to_goal, loss_goal_to_sa, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, w, task, task_id, scale, normalizer, column, q, anchor = ctx.saved_tensors
        n, total, size = len(x), len(y), ctx.size
        by_goal, by_state = (grads[0] * (t / total) for t in ctx.terms)
        pull = by_goal * w  # on the own goal
        push = pull
        if ctx.logsumexp_weight:
            push = pull + grads[0] * (2 * ctx.logsumexp_weight / total) * normalizer
        q = by_state * q
        dx, dy = torch.empty_like(x), torch.zeros_like(y)
        scores, spare = x.new_empty(2, size, total).unbind()
        with torch.autocast(x.device.type, enabled=False):
            for begin in range(0, n, size):
                rows = slice(begin, min(begin + size, n))
                s = torch.mm(x[rows], y.T, out=scores[: rows.stop - begin])
                same = task[rows, None] == task_id
                ds = torch.sub(s, column, out=spare[: len(s)]).exp_().mul_(by_state)
                ds.sub_(q[rows, None] * same).mul_(anchor)
                mine = slice(ctx.start + begin, ctx.start + rows.stop)
                same[:, mine].fill_diagonal_(False)
                s.sub_(normalizer[rows, None]).masked_fill_(same, float("-inf")).exp_()
                ds.addcmul_(s, push[rows, None])
                ds[:, mine].diagonal().sub_(pull[rows])
                torch.mm(ds, y, out=dx[rows])
                dy.addmm_(ds.T, x[rows])
        # ds/dlog_scale is s itself, and sum_ij ds_ij s_ij is x . dx over the own rows.
        dscale = (x * dx).sum().view(ctx.shape)
        return dx.mul_(scale), ctx.processes.reduce_scatter(dy), dscale, None, None, None, None, None, None, None
