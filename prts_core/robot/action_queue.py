"""Execute action chunks at the control rate and have the next one ready before the present one ends.

While the robot executes a chunk, a thread asks for the next. A server that knows real-time chunking (`step`, `delay`:
arXiv:2506.07339) is told how many control steps that will take, and answers with a chunk whose first `delay` rows are
the ones that are executed meanwhile. The delay is what earlier looks took, never a guess.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ..io.errors import ServeError
from .cadence import Cadence
from .connection import LastingConnection

REMEMBERED = 10  # looks whose longest delay is expected of the next one
Observe = Callable[[], dict[str, Any]]


class Starved(ServeError):
    """The chunk has ended, the next one is not here, and the user wants the robot to stop then."""


class ServedPolicy(Protocol):
    """What the queue asks: OpenpiPolicy or GrootPolicy. bridges: whether it reads `step` and `delay`."""

    bridges: bool
    connection: LastingConnection[Any]

    def chunk(self, observation: dict[str, Any], *, step: int, delay: int | None, reset: bool) -> np.ndarray:
        """(chunk, A): row j is for control step `step` + j."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Look:
    """One question under way. step: when it was asked. told: the delay that the server was told."""

    step: int
    told: int | None
    answer: Future[tuple[np.ndarray, bool]]


class ActionQueue:
    """One robot's actions. `start` before a task, then `next` once a control step from one thread; or `run`.

    look_every: control steps between two looks (default: half a chunk); earlier where the delay asks for it.
    when_starved: "stop" raises Starved; "hold" repeats the last action, which keeps a robot that is told positions
    where it is, but moves one that is told displacements further (a contract does not say which of the two actions
    are: the user must); an array (A,) is the action to send meanwhile, such as zeros where they are displacements.
    cadence: the report of this run.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        control_hz: float,
        *,
        look_every: int | None = None,
        when_starved: Literal["hold", "stop"] | np.ndarray = "stop",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < control_hz < math.inf or (look_every is not None and look_every < 1):
            raise ServeError(
                "Actions cannot be executed so",
                field="control_hz, look_every",
                found=f"{control_hz} Hz, {look_every} steps",
                expected="a rate above 0, and 1 step or more",
            )
        if isinstance(when_starved, str) and when_starved not in ("hold", "stop"):
            raise ServeError(
                "This is nothing to do without an action",
                field="when_starved",
                found=when_starved,
                expected='"hold", "stop" or an action',
            )
        self.policy, self.control_hz, self.look_every = policy, control_hz, look_every
        self.when_starved, self.clock = when_starved, clock
        self.cadence = Cadence(1 / control_hz)
        self.step = 0  # control steps executed in this task
        self._delays: deque[int] = deque(maxlen=REMEMBERED)
        self._chunk = np.zeros((0, 0), np.float32)
        self._chunk_step = 0
        self._last: np.ndarray | None = None
        self._look: _Look | None = None
        self._begun = False
        self._executing = True  # the server's latest chunk is the one that is executed here
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prts-look")

    @property
    def delay(self) -> int | None:
        """Control steps that the next look is expected to take: the longest of the last ones; none before any."""
        return max(self._delays, default=None)

    def start(self, observation: dict[str, Any]) -> None:
        """Get the first chunk of a task while the robot stands still. Errors as those of the policy.

        The first question of all is asked twice: a server's first inference may be slow and measures nothing.
        """
        self._finish_look()
        self.cadence.pauses()
        reset, self._begun = self._begun, True
        self.step, self._chunk_step, self._last, self._executing = 0, 0, None, True
        if not self._delays:
            self.policy.chunk(observation, step=0, delay=None, reset=reset)
            reset = False
        asked, lost = self.clock(), self.policy.connection.lost
        self._chunk = self._checked(self.policy.chunk(observation, step=0, delay=None, reset=reset))
        if lost == self.policy.connection.lost:
            self._delays.append(max(1, math.ceil((self.clock() - asked) * self.control_hz)))

    def next(self, observe: Observe) -> np.ndarray:
        """The action (A,) of this control step. observe: called only where the next chunk is asked for now; its arrays
        are read by another thread afterwards, so that they must not be written to again.

        Raises what the policy raised (a refusal; ServerGone once its patience is over), or Starved.
        """
        if self._last is None and not len(self._chunk):
            raise ServeError("There is no chunk yet", cure="call `start` with an observation first")
        self.cadence.begins(self.clock())
        self._take()
        if self._look is None and self.step - self._chunk_step >= self._look_after():
            self._ask(observe())
        row = self.step - self._chunk_step
        action = self._chunk[row] if row < len(self._chunk) else self._without()
        self.step += 1
        self._last = action
        return action.copy()

    def run(
        self,
        observe: Observe,
        act: Callable[[np.ndarray], None],
        *,
        steps: int | None = None,
        stop: threading.Event | None = None,
    ) -> Cadence:
        """Start, then act once a control period: `steps` times, or until `stop` is set. Errors as those of `next`."""
        stop = stop or threading.Event()
        self.start(observe())
        due, done = self.clock(), 0
        while not stop.is_set() and (steps is None or done < steps):
            act(self.next(observe))
            done += 1
            due = max(due + 1 / self.control_hz, self.clock())  # a late step is not made up for by a burst
            stop.wait(max(0.0, due - self.clock()))
        return self.cadence

    def close(self) -> None:
        """Let go of the policy, once a look that is under way is answered or has run into its time-out."""
        self.policy.connection.closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.policy.close()

    def __enter__(self) -> ActionQueue:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- looks ------------------------------------------------------------------------------------------------------
    def _look_after(self) -> int:
        """Rows of a chunk to execute before the next look: so few that its answer is here before the rows end."""
        wanted = self.look_every or max(1, len(self._chunk) // 2)
        return max(1, min(wanted, len(self._chunk) - (self.delay or 0)))

    def _ask(self, observation: dict[str, Any]) -> None:
        step, delay = self.step, self.delay
        if not self._executing:
            delay = None
        if delay is not None and self.policy.bridges:
            executed = max(step - self._chunk_step, delay)
            if delay + executed > len(self._chunk):  # the server would refuse it
                delay = None
                self.cadence.unbridged += 1

        def ask() -> tuple[np.ndarray, bool]:
            lost = self.policy.connection.lost
            chunk = self.policy.chunk(observation, step=step, delay=delay, reset=False)
            return chunk, lost != self.policy.connection.lost

        self._look = _Look(step, delay if self.policy.bridges else None, self._thread.submit(ask))

    def _take(self) -> None:
        """Go over to the chunk that was asked for, if it is here.

        One that came after the connection had been lost is of an observation from before that, and not executed.
        """
        if self._look is None or not self._look.answer.done():
            return
        look, self._look = self._look, None
        chunk, interrupted = look.answer.result()
        self._executing = not interrupted
        if interrupted:
            self.cadence.discarded += 1
            return
        delay = self.step - look.step
        self._delays.append(delay)
        self.cadence.arrived(delay, look.told)
        self._chunk, self._chunk_step = self._checked(chunk), look.step

    def _checked(self, chunk: np.ndarray) -> np.ndarray:
        width = None if self._last is None else len(self._last)
        good = chunk.ndim == 2 and len(chunk) and chunk.dtype.kind in "fiu" and width in (None, chunk.shape[-1])
        if not good or not np.isfinite(chunk).all():
            raise ServeError(
                "The server's actions are no chunk",
                field="actions",
                found="numbers that are not finite" if good else f"{chunk.dtype} {chunk.shape}",
                expected=f"finite numbers (chunk, {width or 'A'})",
            )
        return chunk

    def _without(self) -> np.ndarray:
        self.cadence.starved += 1
        if isinstance(self.when_starved, np.ndarray):
            return self.when_starved
        if self.when_starved == "hold" and self._last is not None:
            return self._last
        raise Starved(
            "The chunk has ended and the next one is not here",
            found=f"a chunk of {len(self._chunk)} steps; looks take {self.delay or 'unknown'} steps",
            expected="an answer before the chunk ends",
            cure="serve the policy faster or nearer, look earlier (look_every), or say what to send meanwhile "
            '(when_starved: "hold" where actions are positions, zeros where they are displacements)',
        )

    def _finish_look(self) -> None:
        """Wait for a look of the task before, whose answer nobody wants."""
        look, self._look = self._look, None
        if look is not None and not look.answer.cancel():
            look.answer.exception()
