"""A message that makes the broker close the channel whenever it is sent: it may harm nobody but itself."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from retry_scheduler.observability import events
from tests.factories import PAYLOAD, encoded, make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

LIMIT_BYTES = 20_000
LARGE_PAYLOAD = PAYLOAD * (LIMIT_BYTES // len(PAYLOAD) + 1)
LARGE = encoded(LARGE_PAYLOAD)

AN_HOUR_MS = "3600000"


@contextmanager
def message_size_limit(rabbitmq: PrivateRabbitMQ, size: int) -> Iterator[None]:
    """What an operator does who protects a broker; it holds for channels opened from now on."""
    before = rabbitmq.eval("{ok, Size} = application:get_env(rabbit, max_message_size), Size.")
    rabbitmq.eval(f"application:set_env(rabbit, max_message_size, {size}).")
    rabbitmq.ctl("close_all_connections", "--global", "new limit")
    try:
        yield
    finally:
        rabbitmq.eval(f"application:set_env(rabbit, max_message_size, {before}).")


def publisher_connections(rabbitmq: PrivateRabbitMQ) -> set[str]:
    """Return the broker's names of the connections through which messages travel together."""
    listed = rabbitmq.ctl("list_connections", "--no-table-headers", "pid", "client_properties")
    lines = [line.split("\t") for line in listed.splitlines()]
    return {pid for pid, about in lines if " publisher " in about and "spare" not in about}


async def test_a_message_that_the_broker_cannot_take_goes_to_people_without_its_payload_and_delays_no_other(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    service = await start_service(BASE_DELAY_MS="3000", MAX_DELAY_MS="3000")
    upstream.declare("orders")
    poison, ids = new_id(), [new_id() for _ in range(300)]
    upstream.ask_for_many(
        [make_request(message_id=poison, original_queue="orders", original_payload=LARGE)]
        + [make_request(message_id=message_id, original_queue="orders") for message_id in ids]
    )
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == len(ids) + 1)

    with message_size_limit(rabbitmq, LIMIT_BYTES):
        await eventually(
            lambda: service.metrics().value("retries_executed_total", status="success") == len(ids),
            within=timedelta(seconds=12),
        )
        (review,) = await upstream.receive(REVIEW_QUEUE, 1, within=timedelta(seconds=30))
        await eventually(table.settled)
        late_s = await table.value(
            "SELECT extract(epoch FROM max(finished_at - created_at))"
            " FROM retry_queue WHERE message_id <> $1",
            poison,
        )

    assert review.review["message_id"] == poison
    assert review.review["reason"] == "unpublishable"
    assert review.review["original_payload"] is None
    kept = await table.value(
        "SELECT octet_length(payload) FROM retry_payload JOIN retry_queue USING (id) WHERE message_id = $1",
        poison,
    )
    assert kept > LIMIT_BYTES
    delivered = Counter(message.message_id for message in upstream.take("orders"))
    assert set(delivered) == set(ids)
    unknown = service.metrics().value("retry_publications_unknown_total")
    assert delivered.total() - len(ids) <= unknown
    assert late_s < 3 + 5, "the others waited for the poison"
    assert not service.log_events(events.RETRY_SUSPECT), "the broker had said which one it was"


async def make_due(table: Table, *message_ids: str) -> None:
    """What an operator does, too."""
    await table.fetch(
        "UPDATE retry_queue SET next_retry_at = now() WHERE message_id = ANY ($1::uuid[])", list(message_ids)
    )


async def is_settled(table: Table, message_id: str) -> bool:
    return bool(
        await table.value("SELECT status <> 'pending' FROM retry_queue WHERE message_id = $1", message_id)
    )


async def test_once_the_broker_has_said_how_much_it_takes_a_larger_message_costs_no_connection_of_others(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    service = await start_service(BASE_DELAY_MS=AN_HOUR_MS, MAX_DELAY_MS=AN_HOUR_MS)
    upstream.declare("orders")
    first, second, ids = new_id(), new_id(), [new_id() for _ in range(300)]
    upstream.ask_for_many(
        [
            make_request(message_id=each, original_queue="orders", original_payload=LARGE)
            for each in (first, second)
        ]
        + [make_request(message_id=each, original_queue="orders") for each in ids]
    )
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == len(ids) + 2)

    with message_size_limit(rabbitmq, LIMIT_BYTES):
        await make_due(table, first)
        await eventually(lambda: is_settled(table, first))
        before = publisher_connections(rabbitmq)
        await make_due(table, second, *ids)
        await eventually(table.settled)
        after = publisher_connections(rabbitmq)

    assert len(before) == 1
    assert after == before
    assert Counter(message.message_id for message in upstream.take("orders")) == Counter(ids)
    reviews = await upstream.receive(REVIEW_QUEUE, 2)
    assert {each.review["message_id"] for each in reviews} == {first, second}
    assert {each.review["reason"] for each in reviews} == {"unpublishable"}


async def test_a_limit_that_was_raised_is_noticed_by_the_next_message_that_is_larger(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    service = await start_service(BASE_DELAY_MS=AN_HOUR_MS, MAX_DELAY_MS=AN_HOUR_MS)
    upstream.declare("orders")
    first, ids = new_id(), [new_id() for _ in range(3)]
    upstream.ask_for_many(
        [
            make_request(message_id=each, original_queue="orders", original_payload=LARGE)
            for each in (first, *ids)
        ]
    )
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 4)
    with message_size_limit(rabbitmq, LIMIT_BYTES):
        await make_due(table, first)
        await eventually(lambda: is_settled(table, first))

    await make_due(table, *ids)

    delivered = await upstream.receive("orders", len(ids))
    assert {each.message_id for each in delivered} == set(ids)
    assert {len(each.body) for each in delivered} == {len(LARGE_PAYLOAD)}
    await eventually(table.settled)
    assert await table.statuses() == {"failed": 1, "retried": len(ids)}


async def test_malformed_input_whose_copy_is_too_large_for_the_broker_goes_to_people_without_it(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    """It came in below the limit; as base64 it is a third larger."""
    await start_service()
    body = b"{" * (LIMIT_BYTES * 4 // 5)
    with message_size_limit(rabbitmq, LIMIT_BYTES):
        upstream.ask(body)
        (review,) = await upstream.receive(REVIEW_QUEUE, 1, within=timedelta(seconds=15))
        await eventually(table.settled)

    kept = await table.row("SELECT id, raw_body FROM retry_quarantine")
    assert review.review["quarantine_id"] == kept["id"]
    assert review.review["original_payload"] is None
    assert kept["raw_body"] == body
