"""Turn SIGTERM, SIGUSR1 and SIGINT into a stop: at once, or after a checkpoint where the work can leave one.

    with stop_on_signals():                       # the command line, a step of Dagster, a rank
        ...                                       # a signal raises here
        with graceful() as stop:                  # the training loop
            trainer.fit(..., should_stop=stop)    # a signal is noted; a second one, a second later, raises

SIGINT ends as KeyboardInterrupt (exit status 130), the others as Stopped (75).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prts_core.io.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_S = 1.0  # a launcher and a terminal both pass one Ctrl-C on
POLL_S = 0.2
AGAIN_S = 0.05
NOTICE = b"stopping: a checkpoint is written first; the same signal again stops at once\n"


class Signalled(KeyboardInterrupt):
    """A stop signal met work that needs no grace. Like KeyboardInterrupt nothing that handles faults catches it."""


class _State:
    """owner: the process whose handlers are in place. asked, since: the signal that asked to stop, and when. hook: what
    else is told of exceptions that nobody can catch."""

    owner = working = asked = 0
    since = 0.0
    hook: Callable[[Any], object] = staticmethod(sys.__unraisablehook__)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Handle the three signals inside the block; earlier handlers come back after it.

    Outside the main thread, and inside another such block, it does nothing. A signal that the caller ignores (SIGINT
    of a shell's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread() or _State.owner == os.getpid():
        yield
        return
    before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    hook, sys.unraisablehook = sys.unraisablehook, _send_again
    _State.owner, _State.hook = os.getpid(), hook
    try:
        for number in before:
            signal.signal(number, _handle)
        yield
    except Signalled as err:
        again = "the same command goes on from here"
        if _State.asked == signal.SIGINT:
            raise KeyboardInterrupt(f"interrupted; {again}") from None
        raise Stopped(f"Stopped by {err}", cure=again) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        sys.unraisablehook = hook
        _State.owner = _State.working = _State.asked = 0


@contextmanager
def graceful() -> Iterator[Callable[[], bool]]:
    """Only note a signal inside the block, which asks the function it gets whether to stop and then raises Stopped.

    A request that came too late for the block to see raises at its end.
    """
    _raise_if_asked()
    _State.working += 1
    try:
        yield lambda: _State.asked != 0
    except Stopped as err:
        if _State.asked == signal.SIGINT:
            raise KeyboardInterrupt(str(err)) from err
        # Another rank may have heard first; this one's own signal is then the same request.
        _State.asked, _State.since = _State.asked or signal.SIGUSR1, time.monotonic()
        raise
    finally:
        _State.working -= 1
    _raise_if_asked()


def stop_when(file: Path) -> None:
    """Signal this process with SIGUSR1 as soon as `file` exists. A launcher's way to reach ranks without a kill."""

    def wait() -> None:
        while not file.exists():
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=wait, name="stop file", daemon=True).start()


def _handle(number: int, frame: Any) -> None:
    if os.getpid() != _State.owner:  # a forked helper: the process that made it decides, but a plain kill still kills
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    now = time.monotonic()
    if not _State.asked:
        _State.asked, _State.since = number, now
        if _State.working:
            os.write(2, NOTICE)
            return
    elif now - _State.since < SAME_REQUEST_S:
        return
    raise Signalled(signal.Signals(number).name)


def _send_again(unraisable: Any) -> None:
    """Of a signal that was raised where Python swallows exceptions (a finaliser, a weak reference's callback): send it
    once more, a moment later, or the request would be lost."""
    if not isinstance(unraisable.exc_value, Signalled) or not _State.asked:
        _State.hook(unraisable)
        return
    number, _State.asked = _State.asked, 0

    def send() -> None:
        if _State.owner == os.getpid():  # the work may have ended meanwhile
            os.kill(os.getpid(), number)

    # From a thread: the handler must not run in here, where what it raises is swallowed as well.
    again = threading.Timer(AGAIN_S, send)
    again.daemon = True
    again.start()


def _raise_if_asked() -> None:
    if _State.asked:
        raise Signalled(signal.Signals(_State.asked).name)
