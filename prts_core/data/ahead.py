"""Run many jobs in threads (encoders, hashes and readers work outside Python's lock; processes start slowly)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from prts_core.io.progress import track

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


def run_parallel(work: Callable[[A], object], todo: Sequence[A], workers: int, what: str) -> None:
    """`work` on every item in threads, with progress. The first fault ends it: what is running is finished, what has
    not begun is left."""
    for _ in track(in_order(work, todo, workers, 4), total=len(todo), what=what):
        pass
