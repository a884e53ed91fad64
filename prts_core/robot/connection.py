"""Keep a connection to a policy server over its restarts: open it again, waiting longer each time, up to a limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ..io.errors import PrtsError, ServeError

BACKOFF_S, LONGEST_WAIT_S = 0.5, 15.0


class ServerGone(ServeError):
    """Nobody answers: asking again, over a new connection, may help."""


class Closes(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closes)
T = TypeVar("T")


class LastingConnection(Generic[C]):
    """At most one client, opened when it is needed and again after it was lost. One thread asks at a time.

    open_client: makes a connected client. patience_s: how long one question goes on trying. closing: an event that ends
    all waiting; shared by connections that end together. lost: connections that ended before they were closed.
    """

    def __init__(self, open_client: Callable[[], C], patience_s: float, closing: threading.Event | None = None) -> None:
        self.open_client, self.patience_s = open_client, patience_s
        self.closing = closing or threading.Event()
        self.lost = 0
        self._client: C | None = None

    def client(self) -> C:
        """The open client, or a new one. Raises as `open_client` does, without patience."""
        if self._client is None:
            self._client = self.open_client()
        return self._client

    def ask(self, question: Callable[[C], T]) -> T:
        """What the client answers. ServerGone where nobody has within the patience; a refusal is raised at once."""
        until, pause = time.monotonic() + self.patience_s, BACKOFF_S
        while True:
            try:
                return question(self.client())
            except ServerGone as err:
                self.drop()
                if time.monotonic() + pause > until or self.closing.is_set():
                    raise ServerGone(
                        "The policy server stayed away",
                        found=str(err),
                        expected=f"an answer within {self.patience_s:g} s",
                        cure="start it again, check the network, or wait longer (patience_s)",
                    ) from err
                self.closing.wait(pause)
                pause = min(2 * pause, LONGEST_WAIT_S)
            except PrtsError:
                self.drop()  # a server that refuses closes the connection
                raise

    def drop(self) -> None:
        """Give the connection up; the next question opens another."""
        client, self._client = self._client, None
        if client is not None:
            self.lost += 1
            client.close()

    def close(self) -> None:
        """End all waiting and the connection; may be called twice, and by another thread."""
        self.closing.set()
        client, self._client = self._client, None
        if client is not None:
            client.close()
