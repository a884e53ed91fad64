"""Say what may watch a server at work: it is told of each answer and of each session's end, on the event loop."""

from __future__ import annotations

from typing import Protocol

from prts_core.serving.engine import Reply
from prts_core.serving.observations import Observation
from prts_core.serving.sessions import Session


class Onlooker(Protocol):
    """Every call returns at once and raises nothing: a request waits for it."""

    def looked(self, session: Session, observation: Observation, reply: Reply) -> None:
        """The reply is about to be sent."""

    def ended(self, session: Session) -> None:
        """No further look belongs to this session."""

    def close(self) -> None:
        """The server has ended. It may take its time."""
