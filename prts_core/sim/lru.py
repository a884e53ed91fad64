"""Keeps the last few scenes a worker built: building one costs seconds. (A simulator's own environment has no
cachetools.)"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """`cache(key)` builds with `build(key)` what it does not hold; beyond `size`, the one unused longest is dropped."""

    def __init__(self, build: Callable[[K], V], size: int, drop: Callable[[V], None]) -> None:
        assert size > 0
        self.build, self.size, self.drop = build, size, drop
        self.held: OrderedDict[K, V] = OrderedDict()

    def __call__(self, key: K) -> V:
        if key not in self.held:
            while len(self.held) >= self.size:
                self.drop(self.held.popitem(last=False)[1])  # before building: two scenes may not fit into memory
            self.held[key] = self.build(key)
        self.held.move_to_end(key)
        return self.held[key]
