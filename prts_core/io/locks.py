"""Lock files between processes: `flock`, which ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.2


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold the lock at `path`, made where it is missing. on_wait: called once when somebody else goes on holding it;
    `prts status`, which looks at locks, holds one for a moment.

    Yields the file descriptor: a child process that inherits it holds the lock too.

    A lock file that was removed while one waited for it (garbage collection) is made anew.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    tries = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = path.open("a+")
        except FileNotFoundError:  # its folder was removed in between
            continue
        with opened as handle:
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                tries += 1
                if on_wait is not None and tries == 2:
                    on_wait()
                time.sleep(POLL_S)
                continue
            if not _still(path, handle.fileno()):
                continue
            yield handle.fileno()
            return


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Hold the lock at `path` if nobody else does; yields whether. The folder must exist."""
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield _still(path, handle.fileno())


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock exclusively right now."""
    try:
        with path.open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
