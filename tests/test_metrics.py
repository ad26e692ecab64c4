"""The metrics: names and labels of the contract, numbers that agree with the table, and a bound on series."""

import math
from datetime import timedelta

from prometheus_client import generate_latest

from retry_scheduler.observability.metrics import Metrics
from tests.contract import METRICS
from tests.factories import make_request, new_id
from tests.service_process import Figures, StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

MOST_QUEUE_LABELS = 200
INVENTED = 1000


async def test_counters_tell_the_truth_about_every_message_that_was_accepted(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="2", RABBITMQ_PREFETCH="500")
    at_first = service.metrics()
    upstream.declare("orders", "bills")
    repeated = new_id()
    upstream.ask_for_many(
        [make_request() for _ in range(40)]
        + [make_request(original_queue="bills") for _ in range(10)]
        + [make_request(original_queue="nowhere") for _ in range(5)]
        + [make_request(max_retries=0) for _ in range(7)]
        + [make_request(message_id=repeated, retry_after_ms=3_600_000) for _ in range(3)]
        + [b"{}", b"[]", make_request(retry_count=-1)]
    )

    await upstream.receive("orders", 40)
    await upstream.receive("bills", 10)
    await upstream.receive(REVIEW_QUEUE, 5 + 7 + 3)
    await eventually(lambda: service.metrics().value("retry_lateness_seconds_count") == 50)
    await eventually(lambda: service.metrics().value("retry_queue_depth") == 1)
    await eventually(lambda: service.metrics().value("retry_oldest_due_seconds") == 0)

    # Where a series begins with its first event, no rate() sees that event.
    assert at_first.labels("retry_quarantined_total", "reason") >= {"body", "message_id", "retry_count"}
    assert at_first.labels("retries_reviewed_total", "reason") == {"exhausted", "unroutable", "unpublishable"}
    assert at_first.labels("retry_duplicates_total", "kind") == {"ignored", "stored_as_next"}
    assert at_first.value("retry_quarantined_total") == at_first.value("retries_reviewed_total") == 0
    metrics = service.metrics()
    assert metrics.names >= METRICS
    assert metrics.value("retries_scheduled_total", queue="orders") == 40 + 7 + 1
    assert metrics.value("retries_scheduled_total", queue="bills") == 10
    assert metrics.value("retries_executed_total", queue="orders", status="success") == 40
    assert metrics.value("retries_executed_total", queue="bills", status="success") == 10
    assert metrics.value("retries_executed_total", queue="nowhere", status="success") == 0
    assert metrics.value("retries_executed_total", queue="nowhere", status="failed") == 10
    assert metrics.labels("retries_executed_total", "status") == {"success", "failed"}
    assert (
        metrics.value("retries_exhausted_total", queue="orders")
        == metrics.value("retries_exhausted_total")
        == 7
    )
    assert metrics.value("retry_duplicates_total", kind="ignored") == 2
    assert metrics.value("retry_quarantined_total", reason="message_id") == 1
    assert metrics.value("retry_quarantined_total", reason="body") == 1
    assert metrics.value("retry_quarantined_total", reason="retry_count") == 1
    assert metrics.value("retry_reconnects_total") == metrics.value("retry_publications_unknown_total") == 0
    # accepted = retried + failed + quarantined + pending + repetitions, in the table and in the counters.
    assert await table.statuses() == {"retried": 50, "failed": 12, "pending": 1}
    assert metrics.value("retries_reviewed_total") == 12
    assert 50 + 12 + 3 + 1 + 2 == 68
    buckets = [metrics.value("retry_lateness_seconds_bucket", le=bound) for bound in ("0.001", "5.0", "+Inf")]
    assert buckets[0] < buckets[1] == buckets[2] == 50
    assert 0 < metrics.value("retry_lateness_seconds_sum") < 50 * 5


async def test_depth_and_the_oldest_due_retry_show_what_cannot_be_delivered(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="1000000", BASE_DELAY_MS="60000", MAX_DELAY_MS="60000")
    upstream.ask(*[make_request(original_queue="nowhere", retry_after_ms=0) for _ in range(3)])
    await eventually(lambda: service.metrics().value("retries_executed_total", status="failed") == 3)
    # Counting is not repeated at every scrape: a figure may be some seconds old.
    await eventually(lambda: service.metrics().value("retry_queue_depth") == 3)

    await table.fetch(
        "UPDATE retry_queue"
        " SET next_retry_at = now() - interval '90 s', claimed_until = now() + interval '1 h'"
    )
    await eventually(
        lambda: service.metrics().value("retry_oldest_due_seconds") > 89, within=timedelta(seconds=5)
    )

    assert math.isclose(service.metrics().value("retry_oldest_due_seconds"), 90, abs_tol=8)


async def test_a_stranger_who_invents_1000_queue_names_cannot_make_series_without_end(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(RABBITMQ_PREFETCH="500", MAX_PUBLISH_FAILURES="1")
    invented = [f"invented-{number}" for number in range(INVENTED)]

    upstream.ask_for_many([make_request(original_queue=queue, max_retries=0) for queue in invented])
    upstream.ask_for_many([make_request(original_queue=queue) for queue in invented[-100:]])
    await eventually(
        lambda: service.metrics().value("retries_reviewed_total") == INVENTED + 100,
        within=timedelta(seconds=20),
    )

    metrics = service.metrics()
    for name, total in (
        ("retries_scheduled_total", INVENTED + 100),
        ("retries_exhausted_total", INVENTED),
        ("retries_executed_total", 100),
    ):
        assert len(metrics.labels(name, "queue")) <= MOST_QUEUE_LABELS + 1
        assert metrics.value(name) == total
    assert metrics.value("retries_exhausted_total", queue="other") == INVENTED - MOST_QUEUE_LABELS
    await eventually(table.settled)


def test_series_are_bounded_whatever_is_counted_and_totals_stay_right() -> None:
    metrics = Metrics()

    for number in range(INVENTED):
        queue = f"invented-{number}"
        metrics.scheduled(queue, count=3)
        metrics.executed(queue, success=True, count=2)
        metrics.executed(queue, success=False)
        metrics.reviewed(queue, "exhausted")
    metrics.scheduled("other")  # somebody's queue may be called that
    figures = Figures(generate_latest(metrics.registry).decode())

    assert figures.value("retries_scheduled_total") == 3 * INVENTED + 1
    assert figures.value("retries_executed_total", status="success") == 2 * INVENTED
    assert figures.value("retries_executed_total", status="failed") == INVENTED
    assert figures.value("retries_exhausted_total") == figures.value("retries_reviewed_total") == INVENTED
    assert figures.value("retries_scheduled_total", queue="other") == 3 * (INVENTED - MOST_QUEUE_LABELS) + 1
    for name in ("retries_scheduled_total", "retries_executed_total", "retries_exhausted_total"):
        assert len(figures.labels(name, "queue")) == MOST_QUEUE_LABELS + 1


async def test_labels_with_quotes_and_line_ends_do_not_break_the_page(
    start_service: StartService, upstream: Upstream
) -> None:
    service = await start_service()
    queue = 'say "hi"\\n} 1\u2028ü'

    upstream.ask(
        make_request(original_queue=queue, max_retries=0), make_request(original_queue="a\nb", max_retries=0)
    )
    await upstream.receive(REVIEW_QUEUE, 2)
    await eventually(lambda: service.metrics().value("retries_exhausted_total") == 2)

    assert service.metrics().labels("retries_exhausted_total", "queue") == {queue, "a\nb"}
