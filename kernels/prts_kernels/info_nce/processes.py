"""How the samples of a batch lie over processes, and the two collectives a loss over all pairs needs.

Every process must call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Processes:
    """One process, which holds all samples: nothing to exchange."""

    rank, world = 0, 1

    def start(self, own: int) -> int:
        """The place of this process's first sample among all of them. own: its number of samples."""
        return 0

    def total(self, own: int) -> int:
        """The number of samples of all processes."""
        return own

    def gather(self, own: Tensor) -> Tensor:
        """(n, ...) of each process -> (N, ...) in order of ranks. Without gradient."""
        return own

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """(N, ...) of each process -> (n, ...): the sum over processes of what belongs to this one's samples."""
        return whole

    def stack(self, values: Tensor) -> Tensor:
        """(...) of equal shape on each process -> (world, ...)."""
        return values[None]


ALONE = Processes()


class Group(Processes):
    """The processes of a torch.distributed group (the default one), of which process r holds counts[r] samples."""

    def __init__(self, counts: Sequence[int], rank: int, group: torch.distributed.ProcessGroup | None = None) -> None:
        self.counts, self.rank, self.world, self.group = tuple(counts), rank, len(counts), group

    def start(self, own: int) -> int:
        self._check(own, self.counts[self.rank])
        return sum(self.counts[: self.rank])

    def total(self, own: int) -> int:
        self._check(own, self.counts[self.rank])
        return sum(self.counts)

    def gather(self, own: Tensor) -> Tensor:
        self._check(len(own), self.counts[self.rank])
        most = max(self.counts)
        padded = own.detach()
        if len(own) < most:
            padded = own.new_zeros(most, *own.shape[1:])
            padded[: len(own)] = own.detach()
        parts = self.stack(padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        self._check(len(whole), sum(self.counts))
        most = max(self.counts)
        parts = []
        for part in whole.split(self.counts):
            if len(part) < most:
                part = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
            parts.append(part.contiguous())
        own = whole.new_empty(most, *whole.shape[1:])
        torch.distributed.reduce_scatter(own, parts, group=self.group)
        return own[: self.counts[self.rank]]

    def stack(self, values: Tensor) -> Tensor:
        parts = values.new_empty(self.world, *values.shape)
        torch.distributed.all_gather(list(parts.unbind()), values.contiguous(), group=self.group)
        return parts

    def _check(self, found: int, meant: int) -> None:
        if found != meant:
            raise ValueError(f"Process {self.rank} of {self.counts} samples: expected {meant} rows, found {found}")
