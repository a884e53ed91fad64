"""Spread one call over processes that somebody else's launcher started (torchrun, deepspeed, srun).

The first process does all bookkeeping and only then calls the others, which wait at the launcher's key-value store.
Waiting there has no time limit and needs no process group, so that hashing a terabyte fails no collective.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from prts_core.io.errors import ConfigError, PrtsError, Stopped

T = TypeVar("T")
START_LIMIT = timedelta(minutes=30)  # from the first process to the last
POLL_S = 0.5
LEAVE_S = 60.0
_calls = itertools.count()


class Followed(Exception):
    """Training is done; a process that only helped goes home."""


def launched() -> int:
    """Processes that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_together(first: Callable[[Callable[[str], None]], T], follow: Callable[[str], None]) -> T:
    """Return `first(call)` in the first process; the others end here, by SystemExit.

    first: calls `call(order)` just before the work that all share, or never. follow: that work in the others, given the
    order; it ends by Followed. An error of the first process is everyone's end; the others say what they alone met.
    """
    from torch.distributed import rendezvous

    store, rank, world = next(rendezvous("env://", timeout=START_LIMIT))
    name = f"prts/call-{next(_calls)}"
    if rank:
        order = _hear(store, name)
        status = _follow(follow, order) if order else 0
        leave()
        raise SystemExit(status)
    called = False

    def call(order: str) -> None:
        nonlocal called
        called = True
        store.set(name, order)

    def dismiss() -> None:
        if not called:
            store.set(name, "")
            _until_heard(store, name, world - 1)

    try:
        made = first(call)
    except Exception:  # not of a stop signal, which the others have got as well
        dismiss()
        raise
    dismiss()
    leave()
    return made


def refuse_many(stage: str, trains: bool) -> None:
    """ConfigError where a launcher started several processes for a stage that runs in one."""
    if launched() > 1 and not trains:
        raise ConfigError(
            f"Stage {stage!r} runs in one process",
            found=f"{launched()} processes",
            cure=f"run `prts {stage}` without torchrun or deepspeed",
        )


def leave() -> None:
    """Leave the process group, if this process is in one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _hear(store: Any, name: str) -> str:
    """What the first process says. Looked up, not waited for, so that a signal is heard as well."""
    while not store.check([name]):
        time.sleep(POLL_S)
    order = store.get(name).decode()
    store.add(f"{name}/heard", 1)
    return order


def _until_heard(store: Any, name: str, others: int) -> None:
    """Keep the store, which may live in this process, until everybody has looked."""
    deadline = time.monotonic() + LEAVE_S
    while store.add(f"{name}/heard", 0) < others and time.monotonic() < deadline:
        time.sleep(POLL_S / 10)


def _follow(follow: Callable[[str], None], order: str) -> int:
    """The exit status of a process that helped."""
    try:
        follow(order)
    except Followed:
        return 0
    except Stopped:
        return 75
    except ConfigError:  # the first process meets it too, and tells it
        return 1
    except PrtsError as err:  # of this process's own rows, disk or part of a checkpoint: nobody else knows it
        print(f"process {os.environ.get('RANK', '?')}: {err}", file=sys.stderr, flush=True)
        return 1
    raise AssertionError("a process that helps did not end in training")
