"""Say which of the processes that train one model this is, and let them agree: counts, wishes, sums.

Gradients, weights and metrics travel by the default group (nccl on GPUs). What is only bookkeeping travels by groups of
its own on the CPU (gloo), so that agreeing on a number waits for no kernel, and a slow disk fails no gradient.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# A collective of the step itself waits for the slowest batch, and for compilers at the first one.
STEP_LIMIT = timedelta(minutes=10)
# Counts wait for the loaders of all processes, at the first step for opening their data.
COUNT_LIMIT = timedelta(minutes=30)
# Files of a checkpoint are waited for while training goes on; the slowest disk decides.
DISK_LIMIT = timedelta(hours=2)


@dataclass(frozen=True)
class ParallelContext:
    """rank of world processes, on `device`. counting, disk: gloo groups for counts of a step and for files, none where
    there is one process."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    counting: ProcessGroup | None = None
    disk: ProcessGroup | None = None

    def gather(self, own: np.ndarray, group: ProcessGroup | None = None) -> np.ndarray:
        """Integers (...) of each process -> (world, ...), on the CPU."""
        if self.world == 1:
            return own[None]
        mine = torch.from_numpy(np.ascontiguousarray(own, np.int64))
        parts = mine.new_empty(self.world, *mine.shape)
        torch.distributed.all_gather(list(parts.unbind()), mine, group=group or self.counting)
        return parts.numpy()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.gather(np.array([int(flag)])).any())

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        """(n,) float32: each of n numbers summed over processes, in one exchange."""
        stacked = torch.stack([value.detach().float().reshape(()) for value in values])
        if self.world > 1:
            torch.distributed.all_reduce(stacked)
        return stacked

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(np.zeros(1, np.int64))


def join_processes() -> ParallelContext:
    """Join the processes that a launcher started (torchrun, deepspeed, srun); without one, be the only process."""
    gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ParallelContext(device=device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if gpu else "gloo", timeout=STEP_LIMIT)
    counting, disk = (torch.distributed.new_group(backend="gloo", timeout=limit) for limit in (COUNT_LIMIT, DISK_LIMIT))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ParallelContext(rank, world, device, counting, disk)
