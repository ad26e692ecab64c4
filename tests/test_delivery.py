"""What comes back to the original queue and to manual review, and when (docs/contract.md)."""

import base64
import json
import random
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest

from tests.factories import PAYLOAD, encoded, make_request, new_id, node_buffer
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Receiver, Upstream, signed_64_bit_header
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACESTATE = "vendor=t61rcWkgMzE,other=00f067aa0ba902b7"

# Names that break careless quoting in SQL, JSON, Erlang or a shell.
ODD_QUEUES = [
    "'; DROP TABLE retry_queue; --",
    '"quoted" \\ back\\slash',
    "日本 🐇 línea",
    "with\ttab and\vothers",
    "../../etc/passwd",
    "%s {0} ${HOME} `id`",
    "é" * 127 + "q",
]


async def test_a_retry_carries_the_promised_properties_and_headers_and_nothing_of_the_request(
    start_service: StartService, upstream: Upstream
) -> None:
    await start_service()
    upstream.declare("orders")
    message_id = new_id()

    upstream.ask(
        make_request(message_id=message_id.upper(), retry_count=1, max_retries=3, error_reason="disk full"),
        headers={
            "traceparent": TRACEPARENT,
            "tracestate": TRACESTATE,
            "x-secret": "of the request",
            "x-death": [{}],
        },
        content_type="application/json",
        correlation_id="of the request",
        message_id="of the request",
        priority=5,
        expiration="600000",
        reply_to="somewhere",
    )
    (message,) = await upstream.receive("orders", 1)

    assert message.headers == {
        "x-retry-count": 2,
        "x-retry-id": f"{message_id}:1",
        "x-original-error": "disk full",
        "x-retry-scheduler": "true",
        "traceparent": TRACEPARENT,
        "tracestate": TRACESTATE,
    }
    assert signed_64_bit_header(message, "x-retry-count") == 2
    properties = vars(message.properties)
    del properties["headers"]
    assert {name: value for name, value in properties.items() if value is not None} == {
        "delivery_mode": 2,
        "message_id": message_id,
    }
    assert message.body == PAYLOAD


async def test_a_request_without_error_and_trace_gets_no_such_headers(
    start_service: StartService, upstream: Upstream
) -> None:
    await start_service()
    upstream.declare("orders")
    fields = {"message_id": new_id(), "original_payload": "", "original_queue": "orders"}

    upstream.ask(json.dumps(fields).encode(), headers={"traceparent": 7, "tracestate": "x" * 2000})
    (message,) = await upstream.receive("orders", 1)

    assert message.headers.keys() == {"x-retry-count", "x-retry-id", "x-retry-scheduler"}
    assert message.body == b""


@pytest.mark.parametrize("form", [encoded, node_buffer], ids=["base64", "Buffer"])
async def test_payloads_of_any_bytes_and_up_to_10_mib_come_back_byte_for_byte(
    start_service: StartService, upstream: Upstream, form: object
) -> None:
    service = await start_service()
    upstream.declare("orders")
    big = 10 * 1024 * 1024 if form is encoded else 1024 * 1024
    payloads = [b"", b"\0", bytes(range(256)), random.Random(7).randbytes(big), b"\xce" * 200_000]
    sent = {new_id(): payload for payload in payloads}

    upstream.ask(
        *[make_request(message_id=key, original_payload=form(payload)) for key, payload in sent.items()]  # type: ignore[operator]
    )
    messages = await upstream.receive("orders", len(sent), within=timedelta(seconds=20))

    received = {message.message_id: sha256(message.body).hexdigest() for message in messages}
    assert received == {key: sha256(payload).hexdigest() for key, payload in sent.items()}
    assert service.metrics().value("retries_executed_total", queue="orders", status="success") == len(sent)


async def test_retries_find_queues_with_names_that_break_careless_quoting(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    upstream.declare(*ODD_QUEUES)

    upstream.ask(*[make_request(original_queue=queue) for queue in ODD_QUEUES])

    for queue in ODD_QUEUES:
        (message,) = await upstream.receive(queue, 1)
        assert message.body == PAYLOAD
    await eventually(table.settled)
    assert service.metrics().labels("retries_executed_total", "queue") == set(ODD_QUEUES)
    rows = await table.fetch("SELECT original_queue FROM retry_queue")
    assert {row["original_queue"] for row in rows} == set(ODD_QUEUES)


async def test_an_error_reason_that_would_burst_a_frame_is_cut_and_still_delivered(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    await start_service()
    upstream.declare("orders")

    upstream.ask(
        make_request(error_reason="é" * 5_000_000), make_request(error_reason="a\0b \ud83d <\x1b[31m\u202e>")
    )
    messages = await upstream.receive("orders", 2)

    errors = {message.headers["x-original-error"] for message in messages}
    assert errors == {"é" * 4096, "a\N{REPLACEMENT CHARACTER}b \N{REPLACEMENT CHARACTER} <\x1b[31m\u202e>"}
    stored = await table.fetch("SELECT error_reason FROM retry_queue")
    assert {row["error_reason"] for row in stored} == errors


async def test_by_default_retries_wait_2_4_8_and_16_s_plus_jitter_and_are_never_early(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(BASE_DELAY_MS="", MAX_DELAY_MS="", JITTER_MS="")
    upstream.declare("orders")
    counts = [0, 1, 2, 3, 4, 5, 40, 999]
    ids = {new_id(): count for count in counts for _ in range(25)}

    with Receiver(upstream, "orders") as receiver:
        upstream.ask_for_many(
            [make_request(message_id=key, retry_count=count, max_retries=1000) for key, count in ids.items()]
        )
        await eventually(lambda: len(receiver) >= 50, within=timedelta(seconds=10))
        received = receiver.messages

    rows = await table.fetch(
        "SELECT message_id, created_at, next_retry_at, finished_at, status FROM retry_queue"
    )
    assert len(rows) == len(ids)
    waits = {
        str(row["message_id"]): (row["next_retry_at"] - row["created_at"]).total_seconds() for row in rows
    }
    for key, count in ids.items():
        least = min(2.0 * 2**count, 60.0)
        # created_at and next_retry_at are two readings of the clock within one statement.
        assert least - 0.05 <= waits[key] <= least + 1.05
    for count in counts:  # jitter is spread over the whole second, not a constant
        same = [waits[key] for key, its in ids.items() if its == count]
        assert max(same) - min(same) > 0.4
    due = {str(row["message_id"]): row["next_retry_at"] for row in rows}
    late = [message.received_at_s - due[message.message_id].timestamp() for message in received]
    assert min(late) >= 0
    assert sorted(late)[len(late) // 2] < 0.25
    scheduled = {
        event["message_id"]: event["next_retry_at"] for event in service.log_events("Retry scheduled")
    }
    assert {key: datetime.fromisoformat(at) for key, at in scheduled.items()} == due


async def test_retry_after_replaces_the_delay_and_reaches_24_hours_at_most(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(BASE_DELAY_MS="60000", MAX_DELAY_MS="60000")
    upstream.declare("orders")
    now, soon, tomorrow, some_day = new_id(), new_id(), new_id(), new_id()

    upstream.ask(
        make_request(message_id=some_day, retry_after_ms=10**30),
        make_request(message_id=tomorrow, retry_after_ms=86_400_000),
        make_request(message_id=soon, retry_after_ms=700),
        make_request(message_id=now, retry_after_ms=0),
    )
    messages = await upstream.receive("orders", 2)

    assert [message.message_id for message in messages] == [now, soon]
    rows = await table.fetch("SELECT message_id, next_retry_at - created_at AS wait FROM retry_queue")
    waits = {str(row["message_id"]): row["wait"].total_seconds() for row in rows}
    assert waits == {
        now: pytest.approx(0, abs=0.05),
        soon: pytest.approx(0.7, abs=0.05),
        tomorrow: pytest.approx(86_400, abs=0.05),
        some_day: pytest.approx(86_400, abs=0.05),
    }
    await eventually(lambda: service.metrics().value("retry_queue_depth") == 2)


@pytest.mark.parametrize(("retry_count", "max_retries"), [(0, 0), (3, 3), (9, 3)])
async def test_an_exhausted_message_goes_to_manual_review_at_once_with_everything_a_person_needs(
    start_service: StartService, upstream: Upstream, table: Table, retry_count: int, max_retries: int
) -> None:
    service = await start_service(BASE_DELAY_MS="60000")
    message_id = new_id()
    payload = bytes(range(256))
    began = datetime.now(UTC)

    upstream.ask(
        make_request(
            message_id=message_id,
            original_payload=encoded(payload),
            original_queue="bills",
            error_reason="no such customer ü",
            retry_count=retry_count,
            max_retries=max_retries,
            retry_after_ms=60_000,
        ),
        headers={"traceparent": TRACEPARENT},
    )
    (message,) = await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)

    review = message.review
    failed_at = datetime.fromisoformat(review.pop("failed_at"))
    assert review == {
        "message_id": message_id,
        "original_queue": "bills",
        "original_payload": base64.b64encode(payload).decode(),
        "error_reason": "no such customer ü",
        "retry_count": retry_count,
        "max_retries": max_retries,
        "reason": "exhausted",
    }
    assert failed_at.utcoffset() == timedelta(0)
    assert began <= failed_at <= datetime.now(UTC)
    headers = message.headers
    assert headers.pop("traceparent", TRACEPARENT) == TRACEPARENT
    assert headers == {
        "x-max-retries-exceeded": "true",
        "x-original-queue": "bills",
        "x-retry-id": f"{message_id}:{retry_count}",
        "x-review-reason": "exhausted",
    }
    assert (message.properties.delivery_mode, message.properties.message_id) == (2, message_id)
    assert await table.statuses() == {"failed": 1}
    metrics = service.metrics()
    assert metrics.value("retries_exhausted_total", queue="bills") == 1
    assert metrics.value("retries_executed_total") == 0
    (event,) = service.log_events("Max retries exceeded - moved to manual review")
    assert (event["message_id"], event["original_queue"], event["retry_count"], event["error_reason"]) == (
        message_id,
        "bills",
        retry_count,
        "no such customer ü",
    )


async def test_a_request_that_names_no_limit_gets_the_default_one(
    start_service: StartService, upstream: Upstream
) -> None:
    await start_service(DEFAULT_MAX_RETRIES="2")
    upstream.declare("orders")
    fields = {"message_id": new_id(), "original_payload": "aGk=", "original_queue": "orders"}

    upstream.ask(
        json.dumps({**fields, "retry_count": 1}).encode(), json.dumps({**fields, "retry_count": 2}).encode()
    )
    (message,) = await upstream.receive("orders", 1)
    (review,) = await upstream.receive(REVIEW_QUEUE, 1)

    assert message.headers["x-retry-count"] == 2
    assert (review.review["max_retries"], review.review["reason"]) == (2, "exhausted")
    assert upstream.depth(RETRY_QUEUE) == 0
