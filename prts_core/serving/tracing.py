"""Report requests as OpenTelemetry traces: request > decode, queue, policy, encode; under the client's span where it
names one. Needs the extra otel; nothing of it is imported unless it is asked for.

Where traces go, and as whose, is said by OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prts_core.io.errors import require
from prts_core.serving.timeline import Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_MS = 5000  # which the last traces may take to leave


class Tracing:
    """provider: whose processors get the spans."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("prts.serve")
        self._epoch = time.time() - time.monotonic()

    @staticmethod
    def to_collector() -> Tracing:
        """Spans go to an OTLP collector over HTTP, in batches, in a thread of their own."""
        require("opentelemetry.sdk", "otel")
        require("opentelemetry.exporter.otlp", "otel")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = Resource({"service.name": "prts-serve"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=named)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return Tracing(provider)

    def report(self, told: Timeline) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        above = None
        if told.parent is not None:
            above = TraceContextTextMapPropagator().extract({"traceparent": told.parent})
        known: dict[str, str | int | float] = {"rpc.system": told.protocol, "prts.client": told.client}
        if told.replies:
            first = told.replies[0]
            known |= {"prts.version": first.version, "prts.batch": first.batch, "prts.samples": len(told.replies)}
            known |= {} if first.value is None else {"prts.value": first.value}
        began = self._nanoseconds(told.began)
        request = self._tracer.start_span("request", above, SpanKind.SERVER, known, start_time=began)
        inside = set_span_in_context(request)
        for name, since, until in told.phases:
            span = self._tracer.start_span(name, inside, start_time=self._nanoseconds(since))
            span.end(self._nanoseconds(until))
        if told.error is not None:
            request.set_status(Status(StatusCode.ERROR, told.error[:300]))
        request.end(self._nanoseconds(told.ended))

    def close(self) -> None:
        self.provider.force_flush(FLUSH_MS)
        self.provider.shutdown()

    def _nanoseconds(self, at: float) -> int:
        return int((at + self._epoch) * 1e9)
