"""Samples of unequal length into rows of fixed length, nearly full.

Rows are filled one after another: the oldest waiting sample always goes in, and of the next POOL samples those whose
sum comes nearest to what is left (subset sum by dynamic programming over bits). First-fit and best-fit decreasing waste
up to a whole sample a row where lengths are alike, as a robot's are; choosing sums fills them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POOL = 48


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of the samples of each row; every sample stands in exactly one row. Deterministic.

    ValueError names a sample longer than a row.
    """
    sizes = [int(n) for n in lengths]
    if sizes and max(sizes) > capacity:
        worst = int(np.argmax(sizes))
        raise ValueError(f"sample {worst} has {sizes[worst]} tokens, a packed row holds {capacity}: raise pack_length")
    waiting = list(range(len(sizes)))
    rows = []
    while waiting:
        head, pool = waiting[0], waiting[1 : POOL + 1]
        chosen = _best_subset([sizes[i] for i in pool], capacity - sizes[head])
        row = [head, *(pool[i] for i in chosen)]
        rows.append(row)
        taken = set(row)
        waiting = [i for i in waiting[: POOL + 1] if i not in taken] + waiting[POOL + 1 :]
    return rows


def _best_subset(sizes: list[int], room: int) -> list[int]:
    """Indices whose sizes sum to the largest reachable number <= room. Bit s of `reach[i]`: s is a sum of the first
    i."""
    everything = (1 << (room + 1)) - 1
    reach = [1]
    for size in sizes:
        reach.append((reach[-1] | (reach[-1] << size)) & everything)
    left, chosen = reach[-1].bit_length() - 1, []
    for i in range(len(sizes), 0, -1):
        if not reach[i - 1] >> left & 1:
            chosen.append(i - 1)
            left -= sizes[i - 1]
    return chosen[::-1]
