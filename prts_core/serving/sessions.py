"""Remember what belongs to one robot's task: the policy's version, its subtask, and the chunk it is executing.

A session is a connection, or what a client names so. Control steps, where a client counts them, place each chunk in
time: row j of the chunk that was asked for at step s is for step s + j.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prts_core.io.errors import ServeError
from prts_core.serving.observations import Observation
from prts_core.serving.versions import Version
from prts_core.value.alarm import State, Watch


@dataclass
class Session:
    """version: whose answers it gets, to its end. connected: it ends with its connection and is not forgotten before.

    words, looks_left: the subtask that the policy is at for `prompt`, and how many more chunks it is for. chunk (T, A),
    chunk_step: what the robot executes and the control step that it was asked for at. step: the last one told. watch:
    over the value since `watched` was first asked for, where the version brings an alarm. Only the event loop writes
    here.
    """

    name: str
    version: Version
    connected: bool = False
    prompt: str = ""
    words: str | None = None
    looks_left: int = 0
    chunk: np.ndarray | None = None
    chunk_step: int | None = None
    step: int | None = None
    watch: Watch | None = None
    watched: str = ""
    watched_from: int = 0

    @property
    def has_alarm(self) -> bool:
        return self.version.alarm is not None

    def saw(self, prompt: str, step: int | None, value: float | None) -> State | None:
        """How the task goes after a look at a control step; none without an alarm, a value or a client's count of its
        steps, by which the alarm was calibrated. Another sentence is another task."""
        alarm = self.version.alarm
        if alarm is None or step is None or value is None:
            return None
        if self.watch is None or prompt != self.watched:
            self.watch, self.watched, self.watched_from = Watch(alarm, prompt), prompt, step
        return self.watch.saw(step - self.watched_from, value)

    def told(self, step: int | None) -> None:
        """The client has executed `step` control steps. ServeError where time runs backwards."""
        if step is not None and self.step is not None and step < self.step:
            raise ServeError(
                "Control steps run backwards",
                field="step",
                found=step,
                expected=f"{self.step} or more, or reset: true for another task",
            )
        self.step = step

    def left(self, step: int | None, delay: int | None, length: int) -> tuple[np.ndarray, int] | None:
        """(rows (length, A) of the chunk under way from `step` on, its last row held; rows executed between two looks),
        or none where the client does not ask to go on from it or has nothing left to execute.

        ServeError where a chunk is too short to bridge the delay.
        """
        if self.chunk is None or self.chunk_step is None or step is None or delay is None:
            return None
        since = step - self.chunk_step
        rows = self.chunk[since:]
        if not len(rows) or (since == 0 and delay == 0):
            return None
        executed = max(since, delay)  # asked again before anything was executed: by the answer, `delay` rows are
        if executed > length - delay:
            raise ServeError(
                "A chunk is too short for real-time chunking at this delay",
                field="delay",
                found=f"delay {delay}, {executed} rows between two looks, chunk {length}",
                expected="delay + rows between two looks at most the chunk",
                cure="look again sooner, serve the policy faster, or leave `delay` out",
            )
        return np.concatenate([rows, np.repeat(rows[-1:], length - len(rows), axis=0)]), executed

    def words_for(self, prompt: str) -> str | None:
        """The subtask that still serves for this prompt, or none."""
        return self.words if self.looks_left > 0 and prompt == self.prompt else None

    def answered(self, observation: Observation, chunk: np.ndarray, words: str | None, looks: int) -> None:
        """An answer has been given. looks: chunks that words serve for."""
        if words is not None:
            kept = words == self.words_for(observation.prompt)
            self.looks_left = (self.looks_left if kept else looks) - 1
            self.prompt, self.words = observation.prompt, words
        self.chunk, self.chunk_step = chunk, observation.step


class Sessions:
    """Those that are open, by name; at most `most`: one more takes the place of the one that was asked for longest ago
    and is no connection. ended: called with each one that is over."""

    def __init__(self, most: int, ended: Callable[[Session], None] = lambda session: None) -> None:
        self.most, self.ended = most, ended
        self.open: OrderedDict[str, Session] = OrderedDict()

    def get(self, name: str, version: Version, connected: bool = False) -> Session:
        """The session of that name; a new one is of `version`. ServeError where there is no room."""
        if name not in self.open:
            if len(self.open) >= self.most:
                self._make_room()
            self.open[name] = Session(name, version, connected)
            version.sessions += 1
        self.open.move_to_end(name)
        return self.open[name]

    def renew(self, name: str) -> None:
        """Begin another task: nothing of the one before counts, an answer to it that is under way included."""
        if (old := self.open.get(name)) is not None:
            self.open[name] = Session(name, old.version, old.connected)
            self.ended(old)

    def close(self, name: str) -> None:
        if (session := self.open.pop(name, None)) is not None:
            session.version.sessions -= 1
            self.ended(session)

    def _make_room(self) -> None:
        for name, session in self.open.items():  # the eldest first
            if not session.connected:
                self.close(name)
                return
        raise ServeError(
            "There are too many sessions",
            found=len(self.open),
            expected=f"at most {self.most}",
            cure="close connections that are over, or serve with a larger --max-clients",
        )
