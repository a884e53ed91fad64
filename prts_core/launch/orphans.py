"""Start helper processes that end with the process that started them, however that one ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1
POLL_S = 1.0


def end_with_parent() -> None:
    """Kill this process (SIGKILL) when its parent is gone. Called first thing in a helper.

    By the kernel on Linux, where the thread that started the helper counts as the parent; elsewhere by a thread that
    looks once a second.
    """
    made_by = multiprocessing.parent_process()
    parent = os.getppid() if made_by is None else made_by.pid
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it went in between
            os.kill(os.getpid(), signal.SIGKILL)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def fresh_workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes. An error or a signal in the block kills them at once; so does the end of this one.

    Spawned, because rendering contexts do not survive a fork.
    """
    spawn = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_help)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise
    finally:
        pool.shutdown()


def _help() -> None:
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to the whole group; the owner of the pool decides
        signal.signal(number, signal.SIG_IGN)
