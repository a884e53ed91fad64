"""The order in which samples of a mixture are drawn: sample number -> (set, row), a pure function of the seed.

A run resumes at sample n by asking for sample n. Every set is walked through in a fresh permutation an epoch; the
mixture is kept exactly in every block of BLOCK samples, not only on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 4096


@dataclass(frozen=True)
class SampleIndex:
    """Sample `number` of the stream is row `row` of set `source`."""

    number: int
    source: int
    row: int


class MixtureSampler:
    """sizes: rows of each set; weights: how often a row of the set is drawn, relative to rows of the others."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes, self.seed = tuple(sizes), seed
        share = np.array([n * w for n, w in zip(sizes, weights, strict=True)], np.float64)
        if not (share >= 0).all() or not share.sum() > 0:
            raise ValueError(f"a mixture needs a positive weight and a row; found sizes {sizes}, weights {weights}")
        self.quota = _largest_remainder(share / share.sum(), BLOCK)  # samples of each set in a block
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._order: dict[int, tuple[int, np.ndarray]] = {}

    def draw(self, number: int) -> SampleIndex:
        block, at = divmod(number, BLOCK)
        if self._block is None or self._block[0] != block:
            kinds = np.repeat(np.arange(len(self.quota)), self.quota)
            kinds = np.random.default_rng([self.seed, 1, block]).permutation(kinds)
            before = np.empty(BLOCK, np.int64)  # how many of the same set stand earlier in the block
            for source in range(len(self.quota)):
                where = kinds == source
                before[where] = np.arange(where.sum())
            self._block = (block, kinds, before)
        source = int(self._block[1][at])
        epoch, index = divmod(block * int(self.quota[source]) + int(self._block[2][at]), self.sizes[source])
        if self._order.get(source, (-1,))[0] != epoch:
            order = np.random.default_rng([self.seed, 2, source, epoch]).permutation(self.sizes[source])
            self._order[source] = (epoch, order)
        return SampleIndex(number, source, int(self._order[source][1][index]))


def _largest_remainder(share: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total`, nearest to share * total; a set with any share gets at least one."""
    exact = share * total
    out = np.floor(exact).astype(np.int64)
    out[(share > 0) & (out == 0)] = 1
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for index in np.resize(order, max(0, total - int(out.sum()))):
        out[index] += 1
    while out.sum() > total:
        out[int(out.argmax())] -= 1
    return out
