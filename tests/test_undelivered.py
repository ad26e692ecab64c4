"""What cannot be delivered: tried again without using up an attempt, then handed to people, never lost."""

from datetime import timedelta

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.broker_users import broker_user, grant
from tests.factories import PAYLOAD, encoded, make_request, new_id
from tests.servers import random_name
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

ALL_RIGHTS = {"configure": ".*", "write": ".*", "read": ".*"}


def failed_publications(service: ServiceProcess, queue: str) -> float:
    return service.metrics().value("retries_executed_total", queue=queue, status="failed")


async def test_a_returned_retry_stays_pending_with_its_count_and_arrives_when_its_queue_appears(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="1000000")
    message_id = new_id()

    upstream.ask(make_request(message_id=message_id, retry_count=1, original_queue="later"))
    await eventually(lambda: failed_publications(service, "later") >= 3)
    row = await table.row(
        "SELECT status, retry_count, publish_failures, next_retry_at - created_at FROM retry_queue"
    )
    upstream.declare("later")
    (message,) = await upstream.receive("later", 1)
    await eventually(table.settled)

    assert (row["status"], row["retry_count"]) == ("pending", 1)
    assert row["publish_failures"] >= 3
    assert message.headers["x-retry-count"] == 2
    assert message.retry_id == f"{message_id}:1"
    assert await table.statuses() == {"retried": 1}
    assert service.metrics().value("retries_executed_total", queue="later", status="success") == 1
    warnings = service.log_events("Retry not delivered - will be tried again")
    assert {(event["message_id"], event["original_queue"], event["retry_count"]) for event in warnings} == {
        (message_id, "later", 1)
    }
    assert [event["publish_failures"] for event in warnings] == list(range(1, len(warnings) + 1))


async def test_after_max_publish_failures_a_message_goes_to_manual_review_as_unroutable(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="3")
    message_id = new_id()

    upstream.ask(make_request(message_id=message_id, retry_count=1, max_retries=5, original_queue="nowhere"))
    (message,) = await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)

    assert message.headers == {
        "x-original-queue": "nowhere",
        "x-retry-id": f"{message_id}:1",
        "x-review-reason": "unroutable",
    }
    review = message.review
    assert (review["reason"], review["retry_count"], review["max_retries"]) == ("unroutable", 1, 5)
    assert review["original_payload"] == encoded(PAYLOAD)
    row = await table.row("SELECT status, retry_count, publish_failures FROM retry_queue")
    assert tuple(row) == ("failed", 1, 3)
    metrics = service.metrics()
    assert failed_publications(service, "nowhere") == 3
    assert metrics.value("retries_exhausted_total") == 0
    assert metrics.value("retries_reviewed_total", reason="unroutable") == 1


async def test_a_retry_that_a_full_queue_refuses_is_tried_again_and_then_arrives(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="1000000")
    upstream.declare("full", x_max_length=1, x_overflow="reject-publish")
    upstream.ask(b"in the way", queue="full")

    upstream.ask(make_request(original_queue="full", retry_count=1))
    await eventually(lambda: failed_publications(service, "full") >= 2)
    row = await table.row("SELECT status, retry_count, publish_failures FROM retry_queue")
    (in_the_way,) = upstream.take("full")
    (message,) = await upstream.receive("full", 1)
    await eventually(table.settled)

    assert tuple(row)[:2] == ("pending", 1)
    assert row["publish_failures"] >= 2
    assert (in_the_way.body, message.body) == (b"in the way", PAYLOAD)
    assert await table.statuses() == {"retried": 1}


async def test_a_queue_that_stays_full_hands_its_messages_to_manual_review(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service(MAX_PUBLISH_FAILURES="2")
    upstream.declare("full", x_max_length=1, x_overflow="reject-publish")
    upstream.ask(b"in the way", queue="full")

    upstream.ask(*[make_request(original_queue="full") for _ in range(3)])
    reviews = await upstream.receive(REVIEW_QUEUE, 3)
    await eventually(table.settled)

    assert {message.review["reason"] for message in reviews} == {"unroutable"}
    assert failed_publications(service, "full") == 6
    assert [message.body for message in upstream.take("full")] == [b"in the way"]


async def test_an_undeliverable_message_does_not_hold_up_the_others_of_its_batch(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    await start_service(MAX_PUBLISH_FAILURES="3", RABBITMQ_PREFETCH="500")
    upstream.declare("orders")
    good = [new_id() for _ in range(400)]
    bodies = [make_request(message_id=message_id) for message_id in good]
    bodies[50:50] = [make_request(original_queue=f"nowhere-{n}") for n in range(100)]

    upstream.ask_for_many(bodies)
    delivered = await upstream.receive("orders", 400)
    reviews = await upstream.receive(REVIEW_QUEUE, 100)
    await eventually(table.settled)

    assert sorted(message.message_id for message in delivered) == sorted(good)
    assert {message.review["original_queue"] for message in reviews} == {f"nowhere-{n}" for n in range(100)}
    assert await table.statuses() == {"retried": 400, "failed": 100}


async def test_one_id_in_flight_to_a_queue_and_to_nowhere_is_delivered_once_and_returned_once(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    await start_service(MAX_PUBLISH_FAILURES="1", RABBITMQ_PREFETCH="500")
    upstream.declare("orders")
    ids = [new_id() for _ in range(50)]

    upstream.ask_for_many(
        [
            make_request(
                message_id=message_id,
                retry_count=count,
                max_retries=9,
                original_queue=queue,
                retry_after_ms=300,
            )
            for message_id in ids
            for count, queue in ((0, "orders"), (1, "nowhere"))
        ]
    )
    delivered = await upstream.receive("orders", 50)
    reviews = await upstream.receive(REVIEW_QUEUE, 50)
    await eventually(table.settled)

    assert sorted(message.retry_id for message in delivered) == sorted(
        f"{message_id}:0" for message_id in ids
    )
    assert sorted(message.retry_id for message in reviews) == sorted(f"{message_id}:1" for message_id in ids)


async def test_a_manual_review_queue_deleted_at_run_time_is_created_again_and_nothing_is_lost(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    await eventually(lambda: upstream.exists(REVIEW_QUEUE))
    upstream.delete(REVIEW_QUEUE)
    exhausted = [new_id() for _ in range(20)]

    upstream.ask(
        *[make_request(message_id=message_id, max_retries=0) for message_id in exhausted], b"malformed"
    )
    reviews = await upstream.receive(REVIEW_QUEUE, 21)
    await eventually(table.settled)

    assert sorted(message.review["message_id"] or "malformed" for message in reviews) == sorted(
        [*exhausted, "malformed"]
    )
    assert await table.statuses() == {"failed": 20}
    assert await table.value("SELECT count(*) FROM retry_quarantine WHERE delivered_at IS NOT NULL") == 1
    # A returned review is not a failed retry.
    assert service.metrics().value("retries_executed_total") == 0
    assert service.metrics().value("retry_reconnects_total") == 0


async def test_a_row_is_failed_only_after_manual_review_has_confirmed_it(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    upstream.declare(REVIEW_QUEUE, x_max_length=1, x_overflow="reject-publish")
    upstream.ask(b"in the way", queue=REVIEW_QUEUE)
    service = await start_service(MAX_PUBLISH_FAILURES="2")

    upstream.ask(make_request(max_retries=0), b"malformed")
    await eventually(lambda: len(service.log_events("Retry not delivered - will be tried again")) >= 6)
    before = await table.statuses()
    undelivered = await table.value("SELECT count(*) FROM retry_quarantine WHERE delivered_at IS NULL")
    reviews = []
    for _ in range(3):
        reviews += await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)

    assert (before, undelivered) == ({"pending": 1}, 1)
    assert reviews[0].body == b"in the way"
    assert {message.review["reason"] for message in reviews[1:]} == {"exhausted", "malformed"}
    assert await table.statuses() == {"failed": 1}
    assert service.metrics().value("retries_exhausted_total", queue="orders") == 1


async def test_queues_that_exist_with_other_arguments_are_used_as_they_are(
    start_service: StartService, upstream: Upstream, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    upstream.declare("retry.scheduled", x_message_ttl=3_600_000)
    upstream.declare(REVIEW_QUEUE, x_queue_mode="lazy")

    service = await start_service()
    upstream.ask(make_request(max_retries=0))
    await upstream.receive(REVIEW_QUEUE, 1, within=timedelta(seconds=5))

    assert service.metrics().value("retry_reconnects_total") == 0
    assert "3600000" in rabbitmq.ctl("list_queues", "-p", vhost, "name", "arguments")


async def test_while_we_may_not_publish_no_row_is_blamed_or_counted_as_unknown_and_then_each_arrives_once(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ, vhost: str
) -> None:
    name = random_name()
    upstream.declare(RETRY_QUEUE, REVIEW_QUEUE, "orders")
    with broker_user(rabbitmq, vhost, name, "secret", **ALL_RIGHTS):
        service = await start_service(
            RABBITMQ_URL=f"amqp://{name}:secret@{rabbitmq.host}:{rabbitmq.port}/{vhost}"
        )
        grant(rabbitmq, vhost, name, **(ALL_RIGHTS | {"write": "^$"}))
        rabbitmq.ctl("close_all_connections", "--vhost", vhost, "maintenance")
        ids = [new_id() for _ in range(5)]
        upstream.ask(*[make_request(message_id=message_id) for message_id in ids])
        await eventually(
            lambda: len(service.log_events("Failed to connect to RabbitMQ")) >= 4,
            within=timedelta(seconds=20),
        )

        rows = await table.fetch("SELECT status, publish_failures, last_error FROM retry_queue")
        metrics = service.metrics()
        grant(rabbitmq, vhost, name, **ALL_RIGHTS)
        messages = await upstream.receive("orders", 5)
        await eventually(table.settled)

    # Certainly not delivered, and no message's fault.
    assert {row["status"] for row in rows} == {"pending"}
    assert {row["publish_failures"] for row in rows} == {0}
    assert {row["last_error"] for row in rows} == {None}
    assert metrics.value("retry_publications_unknown_total") == 0
    # And it heals, each message once.
    assert sorted(message.message_id for message in messages) == sorted(ids)
