"""Reports what comes in and what is published as OpenTelemetry spans, to a collector that speaks OTLP/HTTP.

Only imported where a collector is named: without one, nothing of OpenTelemetry is loaded. Spans wait in a
bounded queue for a thread of their own, and whatever the collector does costs spans and nothing else.

The attributes follow the semantic conventions for messaging, which are still in development: they stand
in this module and nowhere else. What people have to know is in docs/tracing.md.
"""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import requests
import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from retry_scheduler.observability import events

log = structlog.get_logger()

COMPLAIN_EVERY_S = 60.0

# Spans that wait or are on their way: about 8 MB. What comes while it is full is not recorded at all, so
# that a collector that hangs costs less than one that works.
MAX_WAITING_SPANS = 2048
SPANS_PER_EXPORT = 512

# For one batch, repetitions included. Not OTEL_EXPORTER_OTLP_TIMEOUT, which this SDK reads in seconds and
# others in milliseconds: 10000 would be three hours.
EXPORT_TIMEOUT_S = 3.0
# The last spans are worth a moment of the time that the service has for stopping, and no more.
FLUSH_WITHIN_S = 1.0

# Of the requests of one batch, as many as the SDK keeps by default.
MAX_LINKS = 128

_CONFIRMED = "confirmed"
_COMMON = {"messaging.system": "rabbitmq"}
# The request's trace ended long ago, and a batch has many: spans have no parent, they have links.
_NO_PARENT = Context()
_read_context = TraceContextTextMapPropagator().extract


class Tracing:
    """Makes spans. No method but `close` waits for anything, and none raises. Made by `start_tracing`."""

    def __init__(
        self,
        provider: TracerProvider,
        exporter: "_Exporter",
        losses: "_Losses",
        *,
        retry_queue: str,
        manual_review_queue: str,
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("retry_scheduler")
        self._exporter = exporter
        self._losses = losses
        self._retry_queue = retry_queue
        self._review_queue = manual_review_queue
        self._recorded = 0

    def stored(
        self,
        traceparents: Iterable[str],
        *,
        messages: int,
        quarantined: int,
        began_ns: int,
    ) -> None:
        """Report one batch of requests that is stored and acknowledged.

        traceparents: of its requests, where they had one. messages: how many requests there were, and of
        those quarantined: how many were malformed. began_ns: Unix time when the batch was taken in hand.
        """
        try:
            span = self._begin(f"process {self._retry_queue}", SpanKind.CONSUMER, began_ns)
            if span is None:
                return
            for traceparent in islice(traceparents, MAX_LINKS):
                _link(span, traceparent)
            span.set_attributes(
                {
                    **_destination(self._retry_queue),
                    "messaging.operation.name": "process",
                    "messaging.operation.type": "process",
                    "messaging.batch.message_count": messages,
                    "retry_scheduler.quarantined": quarantined,
                }
            )
            span.end()
        except Exception as error:  # a bug, ours or the SDK's: no message may pay for it
            self._losses.note(1, f"they could not be made: {type(error).__name__}")

    def published(
        self,
        *,
        message_id: str,
        original_queue: str,
        retry_count: int,
        retry_id: str,
        review_reason: str | None,
        outcome: str,
        late_s: float,
        body_bytes: int,
        traceparent: str | None,
        began_ns: int,
        ended_ns: int,
    ) -> None:
        """Report one publication, to the original queue or, with a review_reason, to manual review.

        retry_count: as stored. outcome: "confirmed", or what went wrong. body_bytes: of the payload.
        late_s: from the due time to the outcome. traceparent: of the request.
        began_ns, ended_ns: Unix times of the publication and of its outcome.
        """
        try:
            queue = original_queue if review_reason is None else self._review_queue
            # A client's span: what the message carries is the context of its request, and not this one.
            span = self._begin(f"publish {queue}", SpanKind.CLIENT, began_ns)
            if span is None:
                return
            if traceparent is not None:
                _link(span, traceparent)
            span.set_attributes(
                {
                    **_destination(queue),
                    "messaging.operation.name": "publish",
                    "messaging.operation.type": "send",
                    "messaging.message.id": message_id,
                    "messaging.message.body.size": body_bytes,
                    "retry_scheduler.original_queue": original_queue,
                    "retry_scheduler.retry_count": retry_count,
                    "retry_scheduler.retry_id": retry_id,
                    "retry_scheduler.late_ms": round(late_s * 1000, 1),
                }
            )
            if review_reason is not None:
                span.set_attribute("retry_scheduler.review_reason", review_reason)
            if outcome != _CONFIRMED:
                span.set_attribute("error.type", outcome)
                span.set_status(StatusCode.ERROR)
            span.end(ended_ns)
        except Exception as error:  # as above
            self._losses.note(1, f"they could not be made: {type(error).__name__}")

    def close(self) -> None:
        """Send what waits, for FLUSH_WITHIN_S at most; wait for nothing if the last ones were not taken."""
        flush = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        flush.start()
        # A thread that still waits for the collector ends with the process.
        flush.join(0 if self._exporter.failing else FLUSH_WITHIN_S)

    def _begin(self, name: str, kind: SpanKind, began_ns: int) -> Span | None:
        """Return a new span, or None if it is not sampled or would have to wait behind too many."""
        if self._recorded - self._exporter.taken >= MAX_WAITING_SPANS:
            self._losses.note(1, "they come faster than the collector takes them")
            return None
        span = self._tracer.start_span(name, context=_NO_PARENT, kind=kind, start_time=began_ns)
        if not span.get_span_context().trace_flags.sampled:
            return None
        self._recorded += 1
        return span


def start_tracing(*, service_name: str, instance: str, retry_queue: str, manual_review_queue: str) -> Tracing:
    """Start the thread that exports, and return what makes spans for it.

    Which collector, which spans and what else the SDK lets one choose, it reads from OTEL_* itself.
    service_name, instance: what the spans say of this process; OTEL_SERVICE_NAME and
    OTEL_RESOURCE_ATTRIBUTES may say something else.
    Raises ValueError if the SDK refuses one of its settings.
    """
    ours = Resource.create({"service.name": service_name, "service.instance.id": instance})
    losses = _Losses()
    exporter = _Exporter(losses)
    # We stop it ourselves: its own way, at the end of the process, may take half a minute.
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING_SPANS, max_export_batch_size=SPANS_PER_EXPORT)
    )
    # From now on they would report each batch that fails, and may show what stands in a header.
    for library in ("opentelemetry", "urllib3"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return Tracing(
        provider, exporter, losses, retry_queue=retry_queue, manual_review_queue=manual_review_queue
    )


class _Losses:
    """Counts the spans that nobody will see, and says so at most once in COMPLAIN_EVERY_S."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans = 0
        self._said_at_s: float | None = None

    def note(self, spans: int, problem: str) -> None:
        now_s = time.monotonic()
        with self._lock:
            self._spans += spans
            if self._said_at_s is not None and now_s - self._said_at_s < COMPLAIN_EVERY_S:
                return
            lost, self._spans = self._spans, 0
            self._said_at_s = now_s
        log.warning(events.SPANS_LOST, spans=lost, problem=problem)


class _Session(requests.Session):
    """Notes why the last request failed, in words that hold no address, no header and no secret."""

    problem: str | None = None

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        self.problem = None
        try:
            response = super().send(request, **options)
        except requests.RequestException as error:
            self.problem = _in_words(error)
            raise
        if not response.ok:
            self.problem = f"it answered {response.status_code}"
        return response


class _Exporter(SpanExporter):
    """The SDK's exporter, watched. taken: spans that have left the queue for good. failing: the last time."""

    def __init__(self, losses: _Losses) -> None:
        self._session = _Session()
        self._exporter = OTLPSpanExporter(session=self._session, timeout=EXPORT_TIMEOUT_S)
        self._losses = losses
        self.taken = 0
        self.failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.taken += len(spans)
            self.failing = result is not SpanExportResult.SUCCESS
            if self.failing:
                self._losses.note(len(spans), self._session.problem or "no request could be made of them")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK's own oversight


def _in_words(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "TLS: its certificate is refused, or it does not speak TLS on this port"
    if isinstance(error, requests.ConnectionError):
        return "cannot connect, or the connection broke"
    return type(error).__name__


def _destination(queue: str) -> dict[str, str]:
    # Through the default exchange, the queue's name is the routing key, and names the destination.
    return {
        **_COMMON,
        "messaging.destination.name": queue,
        "messaging.rabbitmq.destination.routing_key": queue,
    }


def _link(span: Span, traceparent: str) -> None:
    """Link a span to the context of a request; not if that is none by W3C's rules."""
    # Without tracestate: the SDK would parse it and not export it.
    context = get_current_span(_read_context({"traceparent": traceparent}, _NO_PARENT)).get_span_context()
    if context.is_valid:
        span.add_link(context)
