"""Traces of requests for an OpenTelemetry collector; imported only where one is set.

A request's server span is open while it is answered. Its stages are measured in several threads
and become child spans only at its end, so that no context has to travel between threads.
"""

import logging
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.access_log import description_of, is_probe, path_of
from app.serving.stages import Interval, recording

_FLUSH_S: Final = 3.0
"""Longest wait, at the end, for spans to reach the collector."""
_ABORT_S: Final = 0.5
_MAX_STAGES: Final = 128
"""Child spans of one request; one with hundreds of images has more stages."""
_MAX_USER_AGENT: Final = 256
_FAILED: Final = 500

logger = structlog.get_logger()


class Tracing:
    """Makes spans and sends them, in batches, from a thread of its own.

    The SDK reads its standard variables, such as ``OTEL_TRACES_SAMPLER``, itself.

    Args:
        endpoint: the collector's base address; spans go to ``<endpoint>/v1/traces``.
    """

    def __init__(self, endpoint: str) -> None:
        ours = {"service.name": "normgate", "service.version": version("normgate")}
        self._provider = TracerProvider(
            resource=Resource.create(ours).merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        self._exporter = _Exporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("normgate", ours["service.version"])
        self._propagator = TraceContextTextMapPropagator()

    def install(self, app: Starlette) -> None:
        """Trace the requests of ``app``, with all the middleware that it has by now."""
        app.add_middleware(TracingMiddleware, tracing=self)

    def start_request(self, scope: Scope) -> Span:
        """The server span of a request, child of the caller's span where it sent one."""
        headers = Headers(scope=scope)
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "url.scheme": scope["scheme"],
            "network.protocol.version": scope["http_version"],
        }
        if scope.get("server"):
            attributes["server.address"], attributes["server.port"] = scope["server"]
        if agent := headers.get("user-agent"):
            attributes["user_agent.original"] = agent[:_MAX_USER_AGENT]
        return self._tracer.start_span(
            scope["method"],
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )

    def add_stages(self, span: Span, intervals: Sequence[Interval]) -> None:
        """Give ``span`` a child for each of the first stages; it is their total itself."""
        intervals = [interval for interval in intervals if interval.stage != "total"]
        context: Context = set_span_in_context(span)
        epoch_ns = time.time_ns() - time.monotonic_ns()
        for interval in intervals[:_MAX_STAGES]:
            started_ns = epoch_ns + int(interval.started * 1e9)
            child = self._tracer.start_span(interval.stage, context, start_time=started_ns)
            child.end(epoch_ns + int(interval.ended * 1e9))
        if len(intervals) > _MAX_STAGES:
            span.set_attribute("normgate.stages_left_out", len(intervals) - _MAX_STAGES)

    def stop(self) -> None:
        """Send what is left, for a few seconds at most. Blocks."""
        flushing = threading.Thread(target=self._provider.shutdown, name="flush", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)
        if flushing.is_alive():
            logger.warning("the last traces could not be sent", waited_s=_FLUSH_S)
            # Wakes it between two attempts.
            self._exporter.shutdown()  # type: ignore[no-untyped-call] # the SDK has no types here
            flushing.join(_ABORT_S)
        self._exporter.restore_logger()


class TracingMiddleware:
    """Traces every request but the probes', and puts the trace's id into its log lines."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http" or is_probe(scope):
            await self._app(scope, receive, send)
            return
        span = self._tracing.start_request(scope)
        trace_id = format_trace_id(span.get_span_context().trace_id)
        structlog.contextvars.bind_contextvars(trace_id=trace_id)
        if span.is_recording():
            await self._traced(span, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _traced(self, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        status = _FAILED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with recording() as intervals:
            try:
                await self._app(scope, receive, watched)
            finally:
                _describe(span, scope, status=status)
                self._tracing.add_stages(span, intervals)
                span.end()


def _describe(span: Span, scope: Scope, *, status: int) -> None:
    route = getattr(scope.get("route"), "path_format", None)
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("url.path", path_of(scope))
    span.set_attribute("http.response.status_code", status)
    span.set_attribute("normgate.request_id", scope["state"]["request_id"])
    for name, value in description_of(scope).items():
        span.set_attribute(f"normgate.{name}", value)
    if status >= _FAILED:
        span.set_status(StatusCode.ERROR)
        span.set_attribute("error.type", str(status))


class _Exporter(OTLPSpanExporter):
    """Tells once that the collector is away, and once that it is back."""

    def __init__(self, *, endpoint: str) -> None:
        super().__init__(endpoint=endpoint)
        self._is_failing = False
        self._complaints = _Complaints()
        # Each batch would complain several times, and a full queue at every request.
        self._logger = logging.getLogger(OTLPSpanExporter.__module__)
        self._logger.addFilter(self._complaints)
        logging.getLogger("opentelemetry.sdk._shared_internal").setLevel(logging.ERROR)

    def restore_logger(self) -> None:
        """Let the logger of all exporters speak again."""
        self._logger.removeFilter(self._complaints)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._complaints.first = None
        result = super().export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            logger.warning("traces cannot be sent", reason=self._complaints.first)
        elif self._is_failing and not is_failing:
            logger.info("traces are sent again")
        self._is_failing = is_failing
        return result


class _Complaints(logging.Filter):
    """Keeps the first message of a failed batch, and all of them out of the log."""

    first: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        self.first = self.first or record.getMessage()
        return False
