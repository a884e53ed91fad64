"""Supervise rollout workers: hand out episodes, pass weights on, replace what dies or hangs.

    with Fleet(backend, Publisher(model)) as fleet:
        records = fleet.collect(orders, batch=8)      # a record an order, in their order
        ...                                           # an update of `model`
        fleet.publish()                               # workers get what changed before their next episodes

Orders are dealt out in batches of fixed size and composition. A worker that dies or is silent for `silence` seconds is
named, killed and replaced, and its batch, all of it, goes to whichever worker is free next: the loss costs the time of
one batch. A record depends on weights and orders alone, so records are the same whatever was lost on the way, and by
however many workers they were made.

Asynchronously: `submit` batches, `next` one as it is ready, `publish` at any time. Nothing here runs in a thread:
batches are handed out, and losses noticed, while `next`, `collect` or `publish` run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prts_core.io.errors import CheckpointError, SimulatorError, StageError, from_plain
from prts_core.rl.processes.weights import WHOLE, Publisher, WeightDiff
from prts_core.rl.processes.workers import Backend, Batch, Lost, Report, Sign

LOOK_S = 1.0  # between two looks at workers that say nothing


@dataclass
class _Task:
    number: int
    orders: list[Any]
    lost: int = 0


@dataclass
class _Seat:
    """A worker's place. doing: build, load, collect, ping, or nothing (""). heard: the last sign of life, seconds.
    failed: workers in a row that never came so far as to hold weights."""

    rank: int
    doing: str = ""
    heard: float = 0.0
    version: int | None = None
    loading: tuple[int, int] | None = None
    task: _Task | None = None
    failed: int = 0
    to_check: bool = False


class Fleet:
    """Workers at the backend's places. `lost`: who was lost so far; told to `log` as well.

    silence, start: seconds without a sign of life after which a worker counts as hung, at work and while it builds or
    loads. attempts: workers that one batch may cost, and that a place may lose in a row before one holds weights.
    clock: seconds.
    """

    def __init__(
        self,
        backend: Backend,
        publisher: Publisher,
        *,
        silence: float = 600.0,
        start: float = 900.0,
        attempts: int = 3,
        log: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend, self.publisher, self.log, self.clock = backend, publisher, log, clock
        self.silence, self.start, self.attempts = silence, start, attempts
        self.lost: list[Lost] = []
        self.report = Report(publisher.version)
        self.seats = [_Seat(place.rank) for place in backend.places]
        self.queue: deque[_Task] = deque()
        self.done: deque[Batch] = deque()
        self._diff: WeightDiff | None = None
        self._shared: dict[tuple[int, int], Any] = {}  # (base, version) -> what the backend made of it
        self._numbers = 0
        self._looked = clock()
        for seat in self.seats:
            self._start(seat)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker, whatever it is doing."""
        self.backend.close()

    # ---- what a learner asks for ---------------------------------------------------------------------------------
    def publish(self) -> WeightDiff:
        """Make the learner's model, as it stands, what workers act by from their next batch on."""
        self._diff = self.publisher.publish()
        self.report = Report(self._diff.version, self._diff.bytes, self._diff.seconds)
        self._look(0.0)
        return self._diff

    def collect(self, orders: Sequence[Any], batch: int) -> list[Any]:
        """A record for every order, in their order. batch: orders a worker gets at once; nothing else may be under way.

        SimulatorError where the same episodes cost `attempts` workers, StageError where none can be started, and what
        a worker itself refuses.
        """
        assert batch > 0 and not self.under_way and not self.done, "something else is under way"
        numbers = self.submit(orders[at : at + batch] for at in range(0, len(orders), batch))
        found: dict[int, list[Any]] = {}
        try:
            while len(found) < len(numbers):
                made = self.next()
                assert made is not None, "no time limit was given"
                found[made.number] = made.records
        except BaseException:
            self.cancel()
            raise
        return [record for number in numbers for record in found[number]]

    def submit(self, batches: Iterable[Sequence[Any]]) -> list[int]:
        """Have these batches of orders collected; their numbers."""
        tasks = [_Task(self._numbers + at, list(orders)) for at, orders in enumerate(batches)]
        self._numbers += len(tasks)
        self.queue += tasks
        return [task.number for task in tasks]

    def next(self, timeout: float | None = None) -> Batch | None:
        """Whichever submitted batch is ready next; none where none is within `timeout` seconds (0: look once)."""
        until = None if timeout is None else self.clock() + timeout
        looked = False
        while not self.done:
            assert self.under_way, "nothing is under way"
            left = None if until is None else until - self.clock()
            if looked and left is not None and left <= 0:
                return None
            self._look(left)
            looked = True
        return self.done.popleft()

    def cancel(self) -> None:
        """Forget what was submitted; what a worker has begun it finishes in vain."""
        self.queue.clear()
        self.done.clear()
        for seat in self.seats:
            seat.task = None

    def check(self) -> None:
        """CheckpointError, naming the worker, where one's weights are not those that were published last."""
        for seat in self.seats:
            seat.to_check = True
        while any(seat.to_check for seat in self.seats):
            self._look(None)

    @property
    def under_way(self) -> int:
        """Batches that were submitted and are not ready."""
        return len(self.queue) + sum(seat.task is not None for seat in self.seats)

    # ---- one look ------------------------------------------------------------------------------------------------
    def _look(self, left: float | None) -> None:
        """Give idle workers something to do, hear what has come (waiting at most `left` seconds), judge the silent."""
        away = self.clock() - self._looked
        for seat in self.seats:  # a time in which nobody listened is nobody's silence
            seat.heard += away
        if not all(seat.doing for seat in self.seats):  # who died idle costs no batch
            self._listen(0.0)
        self._occupy()
        ends = [seat.heard + self._limit(seat) for seat in self.seats if seat.doing]
        pause = min([LOOK_S, *(end - self.clock() for end in ends), *([] if left is None else [left])])
        self._listen(max(0.0, pause))
        for seat in self.seats:
            if seat.doing and self.clock() - seat.heard >= self._limit(seat):
                self._lose(seat, f"gave no sign of life for {self._limit(seat):g} s")
        self._occupy()
        self._looked = self.clock()

    def _listen(self, seconds: float) -> None:
        for sign in self.backend.wait(seconds):
            self._hear(sign)

    def _limit(self, seat: _Seat) -> float:
        return self.start if seat.doing in ("build", "load") else self.silence

    def _occupy(self) -> None:
        for seat in self.seats:
            if seat.doing:
                continue
            if seat.version != self.publisher.version:
                fits = self._diff is not None and seat.version == self._diff.base
                seat.loading = (self._diff.base if fits and self._diff else WHOLE, self.publisher.version)
                self._begin(seat, "load", self._share(seat.loading))
            elif seat.to_check:
                self._begin(seat, "ping", True)
            elif self.queue:
                seat.task = self.queue.popleft()
                self._begin(seat, "collect", seat.task.orders)

    def _begin(self, seat: _Seat, call: Any, argument: Any) -> None:
        seat.doing, seat.heard = call, self.clock()
        self.backend.call(seat.rank, call, argument)

    def _share(self, key: tuple[int, int]) -> Any:
        if key not in self._shared:
            used = {seat.loading for seat in self.seats}
            for old in [old for old in self._shared if old[1] != key[1] and old not in used]:
                self.backend.drop(self._shared.pop(old))
            diff = self.publisher.whole() if key[0] == WHOLE else self._diff
            assert diff is not None
            self._shared[key] = self.backend.share(diff)
        return self._shared[key]

    def _hear(self, sign: Sign) -> None:
        seat = self.seats[sign.rank]
        seat.heard = self.clock()
        if sign.kind == "gone":
            self._lose(seat, "died")
        elif sign.kind == "refused":
            name, doing = self.backend.name(seat.rank), self._doing(seat)
            building, refused = seat.doing == "build", from_plain(sign.value)
            seat.doing, seat.task, seat.loading, seat.to_check = "", None, None, False
            if building:
                self.backend.kill(seat.rank)
                self._start(seat)
            refused.add_note(f"(told by {name}, while {doing})")
            raise refused
        elif sign.kind == "reply":
            done, task = seat.doing, seat.task
            seat.doing, seat.task, seat.loading = "", None, None
            if done == "load":
                seat.version, seat.failed = sign.value["version"], 0
                self.report.load_seconds = max(self.report.load_seconds, sign.value["seconds"])
            elif done == "ping":
                seat.to_check = False
                self._compare(seat, sign.value["digest"])
            elif task is not None:
                records, told = sign.value
                self.done.append(Batch(task.number, records, told["version"], seat.rank, told["seconds"]))

    def _compare(self, seat: _Seat, digest: str) -> None:
        if digest != self.publisher.digest():
            raise CheckpointError(
                "A worker's weights are not those of the learner",
                field=self.backend.name(seat.rank),
                found=digest[:16],
                expected=self.publisher.digest()[:16],
                cure="report this: weights of this version have changed on their way, or after it",
            )

    # ---- losses --------------------------------------------------------------------------------------------------
    def _start(self, seat: _Seat) -> None:
        seat.doing, seat.heard, seat.version = "build", self.clock(), None
        self.backend.start(seat.rank)

    def _doing(self, seat: _Seat) -> str:
        if seat.doing == "collect":
            return "collecting" + (" what nobody wants any more" if seat.task is None else f" batch {seat.task.number}")
        return {"build": "starting", "load": "loading weights", "ping": "being asked", "": "idle"}[seat.doing]

    def _lose(self, seat: _Seat, why: str) -> None:
        """Kill the seat's worker, put its batch back in front and start another."""
        name, doing, task = self.backend.name(seat.rank), self._doing(seat), seat.task
        lost = Lost(name, f"{why} ({self.backend.kill(seat.rank)})", doing)
        self.lost.append(lost)
        self.log(str(lost))
        seat.failed = seat.failed + 1 if seat.version is None else 0
        seat.doing, seat.task, seat.loading = "", None, None
        if seat.failed >= self.attempts:
            raise StageError(
                "A rollout worker cannot be started",
                field=name,
                found=f"{seat.failed} in a row were lost before they held weights; the last: {lost}",
            )
        self._start(seat)
        if task is not None:
            task.lost += 1
            self.queue.appendleft(task)
            if task.lost >= self.attempts:
                raise SimulatorError(
                    "The same episodes cost worker after worker",
                    field=f"orders {_shown(task.orders)}",
                    found=f"{task.lost} lost; the last: {lost}",
                    expected="a policy and simulators that survive them",
                )


def _shown(orders: list[Any]) -> str:
    text = ", ".join(f"{order!r:.80}" for order in orders[:3])
    return text + (f" and {len(orders) - 3} more" if len(orders) > 3 else "")
