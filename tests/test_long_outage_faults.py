"""Outages that last: the service idles through them, loses nothing, and works the backlog off in order.

By default each lasts some seconds. LONG_OUTAGE_S=120 makes it two minutes, for a figure by hand.
"""

import os
from datetime import timedelta
from time import time

import pytest

from chaos.proxy import proxies
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import HEALED_WITHIN_S, MOST_DUPLICATES
from tests.factories import encoded, make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.test_broker_alarm import disk_alarm
from tests.under_load import Report, Watch, accounts, copies, first_retry_s, flowing, payload_of, requests
from tests.upstream import RETRY_QUEUE, Load, Message, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

OUTAGE_S = float(os.environ.get("LONG_OUTAGE_S", "15"))
PER_S = 200


def most_overtaken(messages: list[Message], order: list[str]) -> int:
    """Return by how many places a message came later than its turn, at the most. order: ids, oldest first."""
    turn = {message_id: place for place, message_id in enumerate(order)}
    arrived = list(dict.fromkeys(message.message_id for message in messages if message.message_id in turn))
    return max(place - turn[message_id] for place, message_id in enumerate(arrived))


@pytest.mark.timeout(120 + 3 * OUTAGE_S)
async def test_through_a_long_broker_alarm_the_service_idles_and_then_sends_the_oldest_first(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    record_property: Report,
) -> None:
    """The alarm keeps upstreams from publishing as well: what falls due meanwhile was asked for before."""
    upstream.declare("orders", RETRY_QUEUE)
    service = await start_service(RABBITMQ_PREFETCH="500", MAX_DELAY_MS="60000")
    ids = [new_id() for _ in range(int(PER_S * OUTAGE_S))]
    first_due_s = 4 + len(ids) / 2000
    bodies = [
        make_request(
            message_id=message_id,
            original_payload=encoded(payload_of(message_id, 100)),
            retry_after_ms=int((first_due_s + place / PER_S) * 1000),
        )
        for place, message_id in enumerate(ids)
    ]
    upstream.ask_for_many(bodies)
    await eventually(
        lambda: service.metrics().value("retries_scheduled_total") == len(ids), within=timedelta(seconds=30)
    )

    with disk_alarm(rabbitmq):
        await eventually(
            lambda: service.ready().body.get("reason") == "blocked",
            within=timedelta(seconds=first_due_s + 10),
        )
        watch = Watch(service)
        await eventually(lambda: watch.lasted_s > OUTAGE_S, within=timedelta(seconds=OUTAGE_S + 5))
        share = watch.cpu_share
        watch.assert_calm()
        depth = service.metrics().value("retry_queue_depth")
    over_at = time()
    recovered_s = await first_retry_s(table, over_at)
    await eventually(table.settled, within=timedelta(seconds=30))
    worked_off_s = time() - over_at
    order = [
        str(row[0]) for row in await table.fetch("SELECT message_id FROM retry_queue ORDER BY next_retry_at")
    ]
    messages = upstream.take("orders")

    record_property("outage_s", OUTAGE_S)
    record_property("cpu_share", round(share, 3))
    record_property("backlog", depth)
    record_property("first_retry_after_alarm_s", recovered_s)
    record_property("worked_off_s", round(worked_off_s, 1))
    record_property("most_places_late", most_overtaken(messages, order))
    assert depth > len(ids) / 2
    assert share < 0.5
    assert recovered_s <= HEALED_WITHIN_S
    assert copies(messages) == 0
    assert {message.message_id for message in messages} == set(ids)
    assert most_overtaken(messages, order) <= MOST_DUPLICATES  # as many as may be in hand at once


@pytest.mark.timeout(120 + 3 * OUTAGE_S)
async def test_through_a_long_absence_of_postgresql_the_service_idles_and_then_takes_the_oldest_first(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(table.database.port) as (link,):
        service = await start_service(RABBITMQ_PREFETCH="100", POSTGRES_PORT=str(link.port))
        with Load(upstream, requests(), per_second=PER_S) as load:
            await flowing(service)
            watch = Watch(service)
            link.refuse()
            await eventually(lambda: watch.lasted_s > OUTAGE_S, within=timedelta(seconds=OUTAGE_S + 5))
            share = watch.cpu_share
            watch.assert_calm()
            depth = upstream.depth(RETRY_QUEUE)
            link.heal()
            back_at = time()
            recovered_s = await first_retry_s(table, back_at)
            await flowing(service)
            await accounts(load, upstream, table, [service], exactly_once=True, within=timedelta(seconds=60))
    worked_off_s = await table.value(
        "SELECT extract(epoch FROM min(finished_at) - to_timestamp($1))::float8 FROM retry_queue"
        " WHERE created_at > to_timestamp($1) AND message_id = $2",
        back_at,
        load.accepted[-1],
    )
    stored = await table.fetch("SELECT message_id FROM retry_queue ORDER BY created_at, id")
    order = [str(row[0]) for row in stored]
    turn = {message_id: place for place, message_id in enumerate(order)}
    backwards = max(place - turn[message_id] for place, message_id in enumerate(load.accepted))

    record_property("outage_s", OUTAGE_S)
    record_property("cpu_share", round(share, 3))
    record_property("backlog", depth)
    record_property("first_retry_after_return_s", recovered_s)
    record_property("last_one_settled_after_s", worked_off_s)
    record_property("most_places_stored_late", backwards)
    assert depth > OUTAGE_S * PER_S / 2
    assert share < 0.5
    assert recovered_s <= HEALED_WITHIN_S
    assert backwards <= 2 * 100  # the prefetch: what was in the service's hands may be delivered again
