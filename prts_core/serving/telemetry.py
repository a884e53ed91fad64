"""Count what a server does, for Prometheus (GET /metrics): requests, time by phase, batches, budget, value, drift.

Every server has numbers of its own; nothing is global.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from prts_core.serving.engine import Reply

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
NATS = (-20.0, -15.0, -10.0, -7.5, -5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Telemetry:
    """budget_s: within which a chunk should be answered, by the package; none: there is none."""

    def __init__(self, budget_s: float | None = None) -> None:
        self.budget_s = budget_s
        self.registry = CollectorRegistry()

        def made(kind: Any, name: str, told: str, *labels: str, **more: Any) -> Any:
            return kind(name, told, labels, registry=self.registry, **more)

        self._requests = made(Counter, "prts_requests", "Requests that were answered, by version", "version")
        self._refused = made(Counter, "prts_refused", "Requests that were not answered, by why", "why")
        self._seconds = made(Histogram, "prts_seconds", "Seconds of an answer, by phase", "phase", buckets=SECONDS)
        self._batch = made(Histogram, "prts_batch", "Requests that were answered together", buckets=BATCHES)
        self._over = made(Counter, "prts_budget_violations", "Answers that took longer than the package's budget")
        self._value = made(Histogram, "prts_value_nats", "Goal reachability", "version", buckets=NATS)
        self._held = made(Counter, "prts_continued_chunks", "Chunks that went on from the one under way")
        self._drift = made(Gauge, "prts_input_drift", "How far states lie outside the training range, in widths of it")
        self._queue = made(Gauge, "prts_waiting", "Requests that wait")
        self._queued = made(Gauge, "prts_queued_bytes", "Bytes of messages that are here and not answered")
        self._recorded = made(Counter, "prts_recorded", "What was recorded: episodes, looks; looks dropped", "what")
        self._sessions = made(Gauge, "prts_sessions", "Sessions, by version", "version")
        self._serving = made(Gauge, "prts_serving", "1 for the version that new sessions get", "version")
        self._alarms = made(Counter, "prts_alarms", "Looks at which a task was found so", "version", "state")
        self._drifted = 0.0

    def answered(self, reply: Reply, seconds: float) -> None:
        self._requests.labels(reply.version).inc()
        for phase, spent in (("queue", reply.queue_ms / 1e3), ("policy", reply.infer_ms / 1e3), ("all", seconds)):
            self._seconds.labels(phase).observe(spent)
        self._batch.observe(reply.batch)
        if self.budget_s is not None and seconds > self.budget_s:
            self._over.inc()
        if reply.value is not None:
            self._value.labels(reply.version).observe(reply.value)
        if reply.alarm is not None:
            self._alarms.labels(reply.version, reply.alarm).inc()
        if reply.held:
            self._held.inc()
        # A running mean over about a hundred looks.
        self._drifted += 0.01 * (reply.drift - self._drifted)
        self._drift.set(self._drifted)

    def took(self, phase: str, seconds: float) -> None:
        self._seconds.labels(phase).observe(seconds)

    def refused(self, why: str) -> None:
        self._refused.labels(why).inc()

    def waiting(self, count: int) -> None:
        self._queue.set(count)

    def queued(self, count: int) -> None:
        self._queued.set(count)

    def recorded(self, what: str) -> None:
        self._recorded.labels(what).inc()

    def sessions(self, by_version: dict[str, int], serving: str) -> None:
        self._sessions.clear()  # versions that were let go
        self._serving.clear()
        for name, count in by_version.items():
            self._sessions.labels(name).set(count)
            self._serving.labels(name).set(float(name == serving))

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
