"""Average over what counts, so that masks never leak and shares of micro-batches add up to the mean of the update.

Axes: N decisions, K actions of a chunk, A numbers of an action.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prts_core.rl.rollouts import masked


@dataclass(frozen=True)
class Totals:
    """Denominators of an update, over its micro-batches and processes: sums of `Mean.weights` and of `Mean.mask`."""

    weight: Tensor | float
    count: Tensor | float


@dataclass(frozen=True)
class Mean:
    """Averages of (N, 1), (N, K) or (N, K, A).

    mask (N, 1 or K) bool: what counts. weights (N, 1 or K): of a loss, 0 where the mask is false; metrics weigh alike.
    executed (N, K) bool: actions that the simulator took; none: all. kept: entries that are not left out, in the shape
    of what is averaged. totals: none where this minibatch is all there is.

    Finer values than the mask are averaged within one of its entries (the A numbers of an action; where the mask counts
    decisions, the executed actions), coarser ones stand for all of its entries. Nothing counts: 0, with a graph.
    """

    mask: Tensor
    weights: Tensor
    executed: Tensor | None = None
    kept: Tensor | None = None
    totals: Totals | None = None

    @classmethod
    def over(
        cls,
        mask: Tensor,
        counted: Tensor | None = None,
        most: float = 1.0,
        executed: Tensor | None = None,
        totals: Totals | None = None,
    ) -> Mean:
        """With counted (N,), what counts of each decision's whole episode, episodes weigh alike: 1 / (L_i / L_max).

        most: L_max, a scale that the denominator takes out again unless `totals` has another.
        """
        weights = mask.float()
        if counted is not None:
            weights = weights * (most / counted.clamp(min=1).float())[:, None]
        return cls(mask, weights, executed, None, totals)

    def keep(self, kept: Tensor) -> Mean:
        """The same over fewer entries. Denominators of an update stay, so that its shares still add up."""
        return replace(self, kept=kept)

    def counts(self, ndim: int = 2) -> Tensor:
        """(N, 1 or K) bool, with further axes of size 1 up to `ndim`: what counts and was executed."""
        counts = self.mask if self.executed is None else self.mask & self.executed
        return counts.reshape(*counts.shape, *[1] * (ndim - 2))

    def loss(self, x: Tensor) -> Tensor:
        """The weighted mean."""
        return self._mean(x, self.weights, None if self.totals is None else self.totals.weight)

    def metric(self, x: Tensor) -> Tensor:
        """The mean in which everything that counts weighs alike, without a graph."""
        return self._mean(x.detach(), self.mask.float(), None if self.totals is None else self.totals.count)

    def _mean(self, x: Tensor, weights: Tensor, total: Tensor | float | None) -> Tensor:
        summed = self._sum(x if x.dtype == torch.float64 else x.float(), weights)
        if total is not None:
            size = torch.as_tensor(total, dtype=summed.dtype, device=x.device)
        elif self.kept is None:
            size = weights.sum().to(summed.dtype)
        else:
            size = self._sum(torch.ones_like(summed).expand(x.shape), weights)
        return summed / torch.where(size > 0, size, 1.0)

    def _sum(self, x: Tensor, weights: Tensor) -> Tensor:
        single = x.shape[1] == 1  # it stands for all actions of its decision
        x = masked(x, (self.mask if single else self.counts()).reshape(len(x), -1, *[1] * (x.ndim - 2)))
        if self.kept is not None:
            x = masked(x, self.kept)
        if x.ndim == 3:
            x = x.mean(-1)
        if x.shape[1] > weights.shape[1]:
            size = x.shape[1] if self.executed is None else self.executed.sum(1, keepdim=True).clamp(min=1)
            x = x.sum(1, keepdim=True) / size
        return (x * weights).sum()
