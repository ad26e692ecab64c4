"""The metrics: names that alerts and dashboards rely on (docs/contract.md, "Metrics"), and ours.

Every series has a bound: after MAX_QUEUE_LABELS different queues, further ones count as "other".
"""

import threading
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from retry_scheduler.observability.logs import lines_dropped

# Anyone who may send a request may invent queue names; Prometheus pays for each series for ever.
MAX_QUEUE_LABELS = 200
OTHER = "other"

# From a millisecond, where we aim, to the SLA of 5 s and beyond.
LATENESS_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

SERVERS = ("RabbitMQ", "PostgreSQL")
REVIEW_REASONS = ("exhausted", "unroutable", "unpublishable")
DUPLICATE_KINDS = ("ignored", "stored_as_next")
MALFORMED_FIELDS = (
    "body",
    "message_id",
    "original_payload",
    "original_queue",
    "error_reason",
    "retry_count",
    "max_retries",
    "retry_after_ms",
)


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._queues: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._scheduled = counter("retries_scheduled_total", "Attempts stored, by original queue", "queue")
        self._executed = counter(
            "retries_executed_total",
            "Publications to original queues: success is confirmed, failed is returned or refused",
            "queue",
            "status",
        )
        self._exhausted = counter(
            "retries_exhausted_total",
            "Attempts moved to manual review because max_retries was reached",
            "queue",
        )
        self._reviewed = counter(
            "retries_reviewed_total", "Attempts moved to manual review, by reason", "reason"
        )
        self._duplicates = counter(
            "retry_duplicates_total",
            "Requests that repeat a stored attempt: ignored, or stored as the next one",
            "kind",
        )
        self._quarantined = counter(
            "retry_quarantined_total", "Malformed requests quarantined, by the field that is wrong", "reason"
        )
        self._unknown = counter(
            "retry_publications_unknown_total",
            "Publications whose confirm never came: each may become a duplicate",
        )
        self._overtaken = counter(
            "retry_stale_completions_total",
            "Settlements that came too late: another instance had taken the attempt",
        )
        self._reconnects = counter(
            "retry_reconnects_total", "Failed tries and lost connections, by server", "server"
        )
        # A series that begins with its first event hides that event from rate() and increase(): an alert
        # on the first malformed request would stay silent. So these are there from the start, at 0.
        for known, values in (
            (self._reconnects, SERVERS),
            (self._reviewed, REVIEW_REASONS),
            (self._duplicates, DUPLICATE_KINDS),
            (self._quarantined, MALFORMED_FIELDS),
        ):
            for value in values:
                known.labels(value)
        self._lateness = Histogram(
            "retry_lateness_seconds",
            "From the due time to the broker's confirm",
            buckets=LATENESS_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(_LogCollector())
        ProcessCollector(registry=self.registry)

    def scheduled(self, queue: str, count: int = 1) -> None:
        """Count attempts stored."""
        self._scheduled.labels(self._label(queue)).inc(count)

    def executed(self, queue: str, *, success: bool, count: int = 1) -> None:
        """Count publications to an original queue."""
        self._executed.labels(self._label(queue), "success" if success else "failed").inc(count)

    def reviewed(self, queue: str, reason: str) -> None:
        """Count an attempt that manual review has got; an exhausted one also by its queue."""
        self._reviewed.labels(reason).inc()
        if reason == "exhausted":
            self._exhausted.labels(self._label(queue)).inc()

    def duplicate(self, kind: str) -> None:
        """Count a repeated attempt: kind is "ignored" or "stored_as_next"."""
        self._duplicates.labels(kind).inc()

    def quarantined(self, field: str) -> None:
        """Count a malformed request by the field that is wrong."""
        self._quarantined.labels(field).inc()

    def unknown(self) -> None:
        """Count a publication whose confirm never came."""
        self._unknown.inc()

    def overtaken(self) -> None:
        """Count a settlement that came after another instance had taken the attempt."""
        self._overtaken.inc()

    def late(self, seconds: float) -> None:
        """Note by how much a delivered retry was late."""
        self._lateness.observe(seconds)

    def reconnecting(self, server: str) -> None:
        """Count a lost connection or a failed try."""
        self._reconnects.labels(server).inc()

    def watch(
        self,
        *,
        service: str,
        up: Callable[[], bool],
        blocked: Callable[[], bool],
        figures: Callable[[], tuple[int, float] | None],
    ) -> None:
        """Add the gauges that are read when Prometheus asks, in a thread of its own.

        blocked: whether RabbitMQ has an alarm. figures: returns (depth, oldest_due_seconds), or None if it
        cannot tell now.
        """
        gauge = Gauge(
            "service_up", "1 if the service could do its work now", ["service"], registry=self.registry
        )
        gauge.labels(service).set_function(lambda: 1.0 if up() else 0.0)
        Gauge(
            "retry_broker_blocked",
            "1 while RabbitMQ has a memory or disk alarm and takes no messages",
            registry=self.registry,
        ).set_function(lambda: 1.0 if blocked() else 0.0)
        self.registry.register(_QueueCollector(figures))

    def _label(self, queue: str) -> str:
        if queue in self._queues:
            return queue
        if len(self._queues) >= MAX_QUEUE_LABELS:
            return OTHER
        self._queues.add(queue)
        return queue


class _LogCollector(Collector):
    """What the log has lost. It counts itself: it is there before the metrics are."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        yield CounterMetricFamily(
            "retry_log_lines_dropped",
            "Lines of the log that were lost: not read in time, or impossible to write",
            value=lines_dropped(),
        )


class _QueueCollector(Collector):
    """Depth and oldest due retry, counted when asked.

    Without an answer the last known values stay; before the first answer there are none to show.
    """

    def __init__(self, figures: Callable[[], tuple[int, float] | None]) -> None:
        self._figures = figures
        self._last: tuple[int, float] | None = None
        self._lock = threading.Lock()

    def describe(self) -> Iterable[GaugeMetricFamily]:
        # Without this, registering would collect, long before anything is connected.
        return [GaugeMetricFamily("retry_queue_depth", ""), GaugeMetricFamily("retry_oldest_due_seconds", "")]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        with self._lock:
            self._last = self._figures() or self._last
            if self._last is None:
                return
            depth, oldest_due_s = self._last
        yield GaugeMetricFamily(
            "retry_queue_depth", "Number of pending retry tasks in PostgreSQL, up to a million", value=depth
        )
        yield GaugeMetricFamily(
            "retry_oldest_due_seconds",
            "How long the oldest due retry has been waiting; 0 if none is due",
            oldest_due_s,
        )
