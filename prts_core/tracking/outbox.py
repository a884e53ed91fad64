"""Make calls to a server that may be slow, hang or be away, without ever making the caller wait for it.

One thread makes the calls, in order; one that fails is made again later. Only `flush` waits, for a bounded time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # between two tries of a call; the last one from then on
PATIENCE_S = 20.0  # `flush` gives up when nothing has succeeded for so long
GRACE_S = 2.0  # and even then lets a new call have this long


@dataclass(eq=False)
class _Call:
    what: str
    make: Callable[[], None]
    due: float
    seconds: float
    gate: bool
    tries: int = 0


class Outbox:
    """Calls that wait to be made.

    hopeless(error): the call will never succeed and is given up. told(what, error): a call has failed.
    """

    def __init__(self, hopeless: Callable[[Exception], bool], told: Callable[[str, Exception], None]) -> None:
        self._hopeless, self._told = hopeless, told
        self._calls: list[_Call] = []
        self._faults: dict[str, str] = {}  # what has failed and has not succeeded since -> why
        self._changed = threading.Condition()
        self._progress = time.monotonic()  # when a call last succeeded
        self._now: tuple[_Call, float] | None = None  # the call being made, since when
        self._ill = False  # a call has failed, and none has succeeded since
        self._given_up = False  # so has a flush
        self._hurry = self.stopped = False
        self._thread = threading.Thread(target=self._work, name="prts-outbox", daemon=True)
        self._thread.start()

    def put(
        self, what: str, make: Callable[[], None], *, after: float = 0.0, seconds: float = 0.0, gate: bool = False
    ) -> None:
        """Have a call made, unless one of this name waits already.

        after: not before so many seconds, except for a `flush`. seconds: how long it may well take. gate: what comes
        behind it waits until it has succeeded.
        """
        with self._changed:
            under_way = None if self._now is None else self._now[0]
            waits = any(call.what == what and call is not under_way for call in self._calls)
            if not waits and not self.stopped:
                self._calls.append(_Call(what, make, time.monotonic() + after, seconds, gate))
                self._changed.notify_all()

    def flush(self, patience: float = PATIENCE_S) -> bool:
        """Wait until every call is made. False when nothing has succeeded for `patience` seconds."""
        begun = time.monotonic()
        with self._changed:
            self._hurry = True
            for call in self._calls:
                call.due = begun
            self._changed.notify_all()
            while self._calls and not self.stopped:
                if self._given_up:
                    until = begun + min(patience, GRACE_S)
                else:
                    until = max(begun, self._progress) + patience
                    if self._now is not None and not self._ill:
                        until = max(until, self._now[1] + patience + self._now[0].seconds)
                if (left := until - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            self._given_up = bool(self._calls)
            self._hurry = False
            return not self._calls

    def settled(self, what: str, seconds: float) -> bool:
        """Wait until the call `what` has succeeded, at most until it has failed once or `seconds` are over."""
        with self._changed:
            self._changed.wait_for(lambda: what in self._faults or not self._has(what), seconds)
            return what not in self._faults and not self._has(what)

    def stop(self) -> None:
        """Make no more calls. One that is under way is left to itself."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def missing(self) -> dict[str, str]:
        """What the server does not have -> why."""
        with self._changed:
            return {call.what: "not sent in time" for call in self._calls} | self._faults

    def _has(self, what: str) -> bool:
        return any(call.what == what for call in self._calls)

    def _next(self) -> _Call | None:
        """The first call that is due. The caller holds the lock."""
        now = time.monotonic()
        for call in self._calls:
            if call.due <= now:
                return call
            if call.gate:
                return None
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while (call := self._next()) is None and not self.stopped:
                    open_calls = self._calls[:1] if self._calls and self._calls[0].gate else self._calls
                    due = min((c.due for c in open_calls), default=None)
                    self._changed.wait(None if due is None else max(due - time.monotonic(), 0.001))
                if self.stopped or call is None:
                    return
                self._now = (call, time.monotonic())
            error: Exception | None = None
            try:
                call.make()
            except Exception as err:  # noqa: BLE001 - whatever a client or an artifact store raises; `told` says it
                error = err
            with self._changed:
                self._now = None
                if error is None:
                    self._calls.remove(call)
                    self._progress, self._ill, self._given_up = time.monotonic(), False, False
                    if not self._has(call.what):
                        self._faults.pop(call.what, None)
                else:
                    self._failed(call, error)
                self._changed.notify_all()
            if error is not None:
                self._told(call.what, error)

    def _failed(self, call: _Call, error: Exception) -> None:
        self._ill = True
        self._faults[call.what] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        wait = RETRY_SECONDS[min(call.tries, len(RETRY_SECONDS) - 1)]
        call.tries += 1
        call.due = time.monotonic() + (min(wait, 1.0) if self._hurry else wait)
        if self._hopeless(error):
            self._calls.remove(call)
            if call.gate:
                self._calls.clear()
                self.stopped = True
