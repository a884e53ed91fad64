"""One batch spread over processes as one loss: what to gather, sum and share so that N processes compute what
one would on the joint batch.

The rule: every process computes the same joint loss, and its backward gives only the part of the gradient that flows
through its own rows. The engine must therefore *sum* gradients over processes (an engine that averages gets the loss
times `world`). A loss over all pairs of rows keeps the rule by itself, given where the rows are: `processes`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prts_kernels.info_nce import ALONE as ALL_HERE
from prts_kernels.info_nce import Group, Processes


class Ranks:
    """One process: nothing to gather. The joint batch is the batch."""

    rank, world = 0, 1

    def total(self, count: int) -> int:
        """The sum of a count over processes."""
        return count

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes of a tensor without gradient."""
        return values

    def processes(self, count: int) -> Processes:
        """How the rows of the joint batch lie over processes, of which this one has `count`."""
        return ALL_HERE

    def mean(self, local: Tensor, count: int, kind: str) -> Tensor:
        """The joint mean from each process's own mean over `count` items of a `kind` ("fast", "text" or "flow"); that
        of none is 0, and reaches its parameters all the same."""
        return local

    def whole(self, loss: Tensor) -> Tensor:
        """A loss that is no mean over items: every process has computed it from everybody's."""
        return loss


ALONE = Ranks()


class ProcessRanks(Ranks):
    """The processes of torch.distributed's default group, which must have been initialised."""

    def __init__(self) -> None:
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    def total(self, count: int) -> int:
        return sum(self._counts(count))

    def any(self, flag: bool) -> bool:
        return self.total(int(flag)) > 0

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def processes(self, count: int) -> Processes:
        return Group(self._counts(count), self.rank)

    def mean(self, local: Tensor, count: int, kind: str) -> Tensor:
        return _Sum.apply(local * (count / max(1, self.total(count))))

    def _counts(self, count: int) -> list[int]:
        mine = torch.tensor([count], device=self.device)
        counts = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(counts, mine)
        return [int(c) for c in counts]


class _Sum(torch.autograd.Function):
    """All-reduce whose backward is the identity."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
