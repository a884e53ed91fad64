"""What a stretch of training costs: seconds, tokens, samples, waiting for data, memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

from prts_core.training.batch import Batch
from prts_core.training.ranks import Ranks

# Metrics that differ between two runs of equal work: no digest may cover them.
TIMES = ("step_time_s", "data_wait_s", "data_wait_share", "tokens_per_s", "samples_per_s", "memory_gb")


class Meter:
    """Counts from `restart` (or its making) to `read`; rates are those of all processes together."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        self.restart()

    def restart(self) -> None:
        self.begin, self.waited, self.steps, self.tokens, self.samples = time.monotonic(), 0.0, 0, 0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches a batch."""
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin

    def count(self, batches: list[Batch]) -> None:
        """One step over `batches`."""
        self.steps += 1
        self.tokens += sum(batch.tokens.count for batch in batches)
        self.samples += sum(len(batch.tokens) for batch in batches)

    def read(self) -> dict[str, float]:
        """step_time_s, data_wait_s (a step), data_wait_share, tokens_per_s (no padding), samples_per_s, memory_gb
        (10^9 bytes, the most so far: of the GPU's allocator, or resident in this process). Every process must call."""
        seconds = max(1e-9, time.monotonic() - self.begin)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
        return {
            "step_time_s": seconds / max(1, self.steps),
            "data_wait_s": self.waited / max(1, self.steps),
            "data_wait_share": self.waited / seconds,
            "tokens_per_s": self.ranks.total(self.tokens) / seconds,
            "samples_per_s": self.ranks.total(self.samples) / seconds,
            "memory_gb": memory,
        }
