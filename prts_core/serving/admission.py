"""Bound what clients may ask of a server: requests a second, bytes that wait, how long they may be silent.

A client is a connection (openpi) or a socket (GR00T). Every refusal is counted in /metrics, as `prts_refused_total`.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields

from prts_core.io.errors import ServeError
from prts_core.serving.telemetry import Telemetry

MOST_CLIENTS = 4096  # whose rates are remembered
MIB = 2**20


@dataclass(frozen=True)
class Guards:
    """rate: requests a second of one client, a second's worth of them at once; 0: any. queued_bytes: of messages that
    have come and are not answered, over all clients. idle_s: silence after which a connection is closed; 0: never.
    message_s: within which a message that has begun must be whole.
    """

    rate: float = 0.0
    queued_bytes: int = 512 * MIB
    idle_s: float = 0.0
    message_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in {field.name: 0.0 for field in fields(self)}.items():
            value = getattr(self, name)
            if not least <= value < float("inf") or (value == 0 and name in ("queued_bytes", "message_s")):
                flag = {"rate": "--max-rate", "queued_bytes": "--max-queued-mb", "idle_s": "--idle-timeout"}
                raise ServeError(
                    "A server limit must be positive",
                    field=flag.get(name, "--message-timeout"),
                    found=value,
                    expected="above 0" if name in ("queued_bytes", "message_s") else "above 0, or 0 for none",
                )


@dataclass
class _Bucket:
    """allowed: requests that may come now."""

    allowed: float
    at: float


class Admission:
    """queued: bytes of messages that are here at present. It belongs to the event loop."""

    def __init__(self, guards: Guards, telemetry: Telemetry) -> None:
        self.guards, self.telemetry, self.queued = guards, telemetry, 0
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    @contextlib.contextmanager
    def message(self, client: str, size: int) -> Iterator[None]:
        """A client's message of that many bytes, until it is answered. ServeError where it is one too many."""
        self._count(client)
        if self.queued + size > self.guards.queued_bytes:
            self.telemetry.refused("bytes")
            raise ServeError(
                "Too many bytes wait at the server",
                found=f"{self.queued / MIB:.1f} MiB of all clients, and {size / MIB:.1f} MiB of this message",
                expected=f"at most {self.guards.queued_bytes / MIB:g} MiB",
                cure="ask again in a moment, send smaller pictures, or serve with a larger --max-queued-mb",
            )
        self._hold(size)
        try:
            yield
        finally:
            self._hold(-size)

    def forget(self, client: str) -> None:
        self._buckets.pop(client, None)

    def _hold(self, size: int) -> None:
        self.queued += size
        self.telemetry.queued(self.queued)

    def _count(self, client: str) -> None:
        rate = self.guards.rate
        if not rate:
            return
        now, most = time.monotonic(), max(1.0, rate)
        bucket = self._buckets.setdefault(client, _Bucket(most, now))
        self._buckets.move_to_end(client)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        bucket.allowed = min(most, bucket.allowed + rate * (now - bucket.at))
        bucket.at = now
        if bucket.allowed < 1:
            self.telemetry.refused("rate")
            raise ServeError(
                "A client asks too often",
                found=f"more than {rate:g} requests a second",
                expected=f"at most {rate:g} a second",
                cure=f"ask again in {(1 - bucket.allowed) / rate:.2f} s, or serve with a larger --max-rate",
            )
        bucket.allowed -= 1
