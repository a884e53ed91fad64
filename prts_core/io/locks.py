"""Lock files between processes: `flock`, which ends with the process that holds it.

Not the package filelock: its read-write lock is a database, it cannot ask without taking the lock, and it takes a lock
file that was moved away with its folder, as garbage collection does, for the one at the path.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

POLL_S = 0.2


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold the lock at `path`, made where it is missing. on_wait: called once when somebody else goes on holding it;
    `prts status`, which looks at locks, holds one for a moment.

    Yields the file descriptor: a child process that inherits it holds the lock too.

    A lock file that was removed while one waited for it (garbage collection) is made anew.
    """
    tries = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = path.open("a+")
        except FileNotFoundError:  # its folder was removed in between
            continue
        with opened as handle:
            if not take(handle, shared=shared):
                tries += 1
                if on_wait is not None and tries == 2:
                    on_wait()
                time.sleep(POLL_S)
            elif _still(path, handle):
                yield handle.fileno()
                return


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Hold the lock at `path` if nobody else does; yields whether. The folder must exist."""
    with path.open("a+") as handle:
        yield take(handle) and _still(path, handle)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock exclusively right now."""
    try:
        with path.open("r") as handle:
            return not take(handle, shared=True)
    except FileNotFoundError:
        return False


def take(handle: IO[Any], *, shared: bool = False) -> bool:
    """Lock an open file until it is closed; False where somebody else holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except BlockingIOError:
        return False
    return True


def _still(path: Path, handle: IO[Any]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False
