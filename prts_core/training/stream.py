"""The order in which samples of a mixture are drawn: sample number -> (set, row), a pure function of the seed.

A run resumes at sample n by asking for sample n. Every set is walked through in a fresh permutation an epoch, which of
a large set is computed, not stored; the mixture is kept exactly in every block of BLOCK samples, not only on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 4096
STORED = 2**20  # rows of a set whose order is kept in memory, 8 MB; drawing it is exact, and free of hashing in Python


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
        self._order: dict[int, tuple[int, Permutation | np.ndarray]] = {}

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
            self._order[source] = (epoch, permutation(self.sizes[source], (self.seed, 2, source, epoch)))
        return SampleIndex(number, source, int(self._order[source][1][index]))


def permutation(size: int, key: Sequence[int]) -> Permutation | np.ndarray:
    """A pseudo-random order of range(size): drawn where it fits a few MB, computed where it would take gigabytes."""
    return np.random.default_rng(key).permutation(size) if size <= STORED else Permutation(size, key)


class Permutation:
    """A pseudo-random permutation of range(size) in no memory: a Feistel network, walked until it falls inside.

    Numbers stand as a pair (left, right) in a square just large enough; each round adds a hash of the one half to the
    other, which can be undone, so that the square maps onto itself. Who leaves the range goes round again: Black and
    Rogaway, Ciphers with Arbitrary Finite Domains (2002).
    """

    ROUNDS = 6

    def __init__(self, size: int, key: Sequence[int]) -> None:
        self.size, self.side = size, math.isqrt(max(0, size - 1)) + 1
        self.keys = np.random.SeedSequence(key).generate_state(self.ROUNDS, np.uint64).tolist()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} of {self.size}")
        at = index
        while True:
            left, right = divmod(at, self.side)
            for key in self.keys:
                left, right = right, (left + _mixed(right ^ key)) % self.side
            at = left * self.side + right
            if at < self.size:
                return at


def _mixed(value: int) -> int:
    """64 bits of which each depends on all of `value`: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


_WORD = 2**64 - 1


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
