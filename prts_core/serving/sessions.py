"""Remember what belongs to one robot's task: the policy's version, its subtask, and the chunk it is executing.

A session is a connection, or what a client names so. Control steps, where a client counts them, place each chunk in
time: row j of the chunk that was asked for at step s is for step s + j.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from prts_core.io.errors import ServeError
from prts_core.serving.versions import Version

IDLE_S = 600.0  # a session that says nothing for so long may be forgotten for another


@dataclass
class Session:
    """version: whose answers it gets, to its end. words, looks_left: the subtask that it is at and how many more chunks
    it is for. chunk (T, A), chunk_step: what it executes and the control step that it was asked for at. step: the last
    one told."""

    name: str
    version: Version
    words: str | None = None
    looks_left: int = 0
    chunk: np.ndarray | None = None
    chunk_step: int | None = None
    step: int | None = None
    looks: int = 0
    last: float = field(default_factory=time.monotonic)

    def reset(self) -> None:
        """Begin another task: nothing of the one before counts."""
        self.words, self.looks_left, self.chunk, self.chunk_step, self.step, self.looks = None, 0, None, None, None, 0

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

    def left(self, length: int) -> tuple[np.ndarray, int] | None:
        """(rows (length, A) of the chunk under way from now on, its last row held; rows executed since it was asked
        for), or none where the client does not count steps or has nothing left to execute."""
        if self.chunk is None or self.chunk_step is None or self.step is None:
            return None
        executed = self.step - self.chunk_step
        rows = self.chunk[executed:]
        if executed < 1 or not len(rows):
            return None
        return np.concatenate([rows, np.repeat(rows[-1:], length - len(rows), axis=0)]), executed

    def answered(self, chunk: np.ndarray) -> None:
        self.chunk, self.chunk_step = chunk, self.step
        self.looks += 1


class Sessions:
    """Those that are open, by name; at most `most`: one more takes the place of the one idle for longest, if any is."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: OrderedDict[str, Session] = OrderedDict()

    def get(self, name: str, version: Version) -> Session:
        """The session of that name; a new one is of `version`. ServeError where there is no room."""
        if name not in self.open:
            if len(self.open) >= self.most:
                eldest = next(iter(self.open.values()))
                if time.monotonic() - eldest.last < IDLE_S:
                    raise ServeError(
                        "There are too many sessions",
                        found=len(self.open),
                        expected=f"at most {self.most}",
                        cure="close some, or serve with a larger --max-clients",
                    )
                self.close(eldest.name)
            self.open[name] = Session(name, version)
            version.sessions += 1
        self.open.move_to_end(name)
        session = self.open[name]
        session.last = time.monotonic()
        return session

    def close(self, name: str) -> None:
        if (session := self.open.pop(name, None)) is not None:
            session.version.sessions -= 1
