"""Malformed input among good input: every bad one is set aside with its bytes, no good one suffers."""

import base64
from collections import Counter
from datetime import datetime, timedelta

from tests.factories import make_request, new_id
from tests.malformed import MALFORMED
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

GOOD_ONES = 500


async def test_each_kind_of_malformed_input_goes_to_people_and_500_good_ones_are_delivered(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    upstream.declare("orders")
    good = [new_id() for _ in range(GOOD_ONES)]
    mixed = [make_request(message_id=message_id) for message_id in good]
    for place, malformed in enumerate(MALFORMED):
        mixed.insert(place * len(mixed) // len(MALFORMED), malformed.body)

    upstream.ask_for_many(mixed)
    delivered = await upstream.receive("orders", GOOD_ONES, within=timedelta(seconds=20))
    reviews = await upstream.receive(REVIEW_QUEUE, len(MALFORMED), within=timedelta(seconds=20))
    await eventually(table.settled)

    assert sorted(message.message_id for message in delivered) == sorted(good)
    assert sorted(base64.b64decode(message.review["original_payload"]) for message in reviews) == sorted(
        malformed.body for malformed in MALFORMED
    )
    fields = {malformed.body: malformed.field for malformed in MALFORMED}
    for message in reviews:
        review = message.review
        field = fields[base64.b64decode(review["original_payload"])]
        assert review["reason"] == "malformed"
        assert review["error_reason"].startswith(f"{field}: ")
        assert datetime.fromisoformat(review["failed_at"]).utcoffset() == timedelta(0)
        assert message.headers["x-review-reason"] == "malformed"
        assert "x-max-retries-exceeded" not in message.headers
    rows = await table.fetch(
        "SELECT field, raw_body, seen, delivered_at, publish_failures FROM retry_quarantine"
    )
    assert {(row["raw_body"], row["field"]) for row in rows} == set(fields.items())
    assert all(row["seen"] == 1 and row["delivered_at"] and row["publish_failures"] == 0 for row in rows)
    assert await table.statuses() == {"retried": GOOD_ONES}
    metrics = service.metrics()
    assert metrics.value("retry_quarantined_total") == len(MALFORMED)
    by_field = Counter(fields.values())
    assert metrics.labels("retry_quarantined_total", "reason") == set(by_field)
    assert {field: metrics.value("retry_quarantined_total", reason=field) for field in by_field} == by_field
    assert metrics.value("retries_scheduled_total", queue="orders") == GOOD_ONES
    assert await service.stop() == 0
    assert upstream.depth(RETRY_QUEUE) == 0


async def test_one_malformed_request_in_a_batch_of_500_is_the_only_one_set_aside(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    good = [new_id() for _ in range(GOOD_ONES)]
    bodies = [make_request(message_id=message_id) for message_id in good]
    bodies.insert(250, b"not JSON at all")
    upstream.ask_for_many(bodies)

    service = await start_service(RABBITMQ_PREFETCH="500")
    delivered = await upstream.receive("orders", GOOD_ONES)
    (review,) = await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)

    assert sorted(message.message_id for message in delivered) == sorted(good)
    assert base64.b64decode(review.review["original_payload"]) == b"not JSON at all"
    assert await table.statuses() == {"retried": GOOD_ONES}
    (quarantined,) = service.log_events("Malformed request quarantined")
    assert (quarantined["level"], quarantined["field"]) == ("WARNING", "body")


async def test_the_same_malformed_bytes_sent_twice_are_two_messages(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    await start_service()

    upstream.ask(b"{", b"{")
    first, second = await upstream.receive(REVIEW_QUEUE, 2)

    assert first.retry_id != second.retry_id
    assert await table.value("SELECT count(*) FROM retry_quarantine") == 2


async def test_malformed_input_of_12_mib_is_kept_whole_and_its_copy_says_where(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    await start_service()
    body = b"{" + b"x" * (12 * 1024 * 1024)

    upstream.ask(body)
    (message,) = await upstream.receive(REVIEW_QUEUE, 1)

    kept = await table.row("SELECT id, raw_body FROM retry_quarantine")
    assert kept["raw_body"] == body
    assert message.review["original_payload"] is None
    assert message.review["quarantine_id"] == kept["id"]
