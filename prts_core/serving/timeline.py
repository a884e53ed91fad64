"""Time one request by its phases, and say once what came of it: to metrics, the page, the log and traces."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prts_core.serving.engine import Reply


@dataclass
class Timeline:
    """One request of `client` by `protocol`. phases: (name, from, to) in seconds of time.monotonic. parent: what the
    client says that it is part of (W3C traceparent). error: why it was refused."""

    protocol: str
    client: str
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    parent: str | None = None
    replies: Sequence[Reply] = ()
    error: str | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.phases.append((name, began, time.monotonic()))

    def answered(self, asked: float, replies: Sequence[Reply]) -> None:
        """The policy's answers to what was asked at that moment, together: the slowest counts."""
        self.replies = replies
        started = asked + max((reply.queue_ms for reply in replies), default=0.0) / 1e3
        ended = started + max((reply.infer_ms for reply in replies), default=0.0) / 1e3
        self.phases += [("queue", asked, started), ("policy", started, ended)]
