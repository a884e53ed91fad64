"""Say how many threads torch computes with on a CPU: it splits sums between them, so that the number is part of a
result's last bits.

The number belongs to a thread and to the process: whoever computes says it, and leaves what was there before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

POLICY_THREADS = 2  # of the stages that ask a policy in an order of their own, on any machine


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads inside the block, in the thread that enters it; none: with as many as before."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
