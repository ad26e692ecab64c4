"""A message that makes the broker close the channel whenever it is sent: it may harm nobody but itself."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.factories import PAYLOAD, encoded, make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

LIMIT_BYTES = 20_000


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


async def test_a_message_that_the_broker_cannot_take_goes_to_people_without_its_payload_and_delays_no_other(
    start_service: StartService, upstream: Upstream, table: Table, rabbitmq: PrivateRabbitMQ
) -> None:
    service = await start_service(BASE_DELAY_MS="3000", MAX_DELAY_MS="3000")
    upstream.declare("orders")
    poison, ids = new_id(), [new_id() for _ in range(300)]
    large = encoded(PAYLOAD * (LIMIT_BYTES // len(PAYLOAD) + 1))
    upstream.ask_for_many(
        [make_request(message_id=poison, original_queue="orders", original_payload=large)]
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
