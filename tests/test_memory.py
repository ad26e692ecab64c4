"""Memory stays bounded, whatever is due: what cannot be sent waits in the table, not in the process."""

import random
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256

import pytest

from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.factories import encoded, make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

MIB = 1024 * 1024
LARGE = 8 * MIB


@pytest.mark.timeout(120)
async def test_large_retries_that_the_broker_does_not_take_stay_in_the_table(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    record_property: Callable[[str, object], None],
) -> None:
    service = await start_service()
    upstream.declare("orders")
    payload = random.Random(3).randbytes(LARGE)
    ids = [new_id() for _ in range(40)]
    for message_id in ids:
        upstream.ask(
            make_request(message_id=message_id, original_payload=encoded(payload), retry_after_ms=3_600_000)
        )
    await eventually(
        lambda: service.metrics().value("retries_scheduled_total") == len(ids), within=timedelta(seconds=30)
    )
    upstream.ask(make_request())  # a connection that has proven itself is trusted with large batches
    await upstream.receive("orders", 1)
    before = service.peak_rss_bytes

    rabbitmq.freeze()
    await table.fetch("UPDATE retry_queue SET next_retry_at = now() WHERE status = 'pending'")
    # The silent broker is noticed by its missing heartbeats; until then as much is claimed as may be in hand.
    await eventually(
        lambda: service.metrics().value("retry_reconnects_total", server="RabbitMQ") > 0,
        within=timedelta(seconds=40),
    )
    rabbitmq.thaw()
    messages = await upstream.receive("orders", len(ids), within=timedelta(seconds=40))
    await eventually(table.settled, within=timedelta(seconds=10))

    record_property("peak_rss_mib", [before // MIB, service.peak_rss_bytes // MIB])
    assert {message.message_id for message in messages} == set(ids)
    assert {sha256(message.body).digest() for message in messages} == {sha256(payload).digest()}
    assert service.peak_rss_bytes < 512 * MIB


async def test_fifty_thousand_pending_retries_cost_no_memory_before_they_are_due(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    upstream.declare("orders")
    before = service.rss_bytes

    await table.fetch(
        "WITH added AS (INSERT INTO retry_queue"
        " (message_id, original_queue, retry_count, max_retries, next_retry_at, payload_bytes)"
        " SELECT gen_random_uuid(), 'orders', 0, 3, now() + interval '1 hour', 1"
        " FROM generate_series(1, 50000) RETURNING id) INSERT INTO retry_payload SELECT id, 'x' FROM added"
    )
    await eventually(
        lambda: service.metrics().value("retry_queue_depth") == 50_000, within=timedelta(seconds=20)
    )
    upstream.ask(make_request())
    await upstream.receive("orders", 1)

    assert service.rss_bytes - before < 20 * MIB
