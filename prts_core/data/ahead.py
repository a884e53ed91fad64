"""Results of many jobs in their order, some of them made ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_order(call: Callable[[A], B], jobs: Iterable[A], workers: int, each: int = 1) -> Generator[B, None, None]:
    """`call` of every job in order, `each` a worker begun before they are asked for: reading, hashing and decoding
    leave Python's lock. Memory holds a few results, however many jobs there are; none is begun after a fault."""
    workers = max(1, workers)
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(call, job))
                if len(waiting) > each * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
