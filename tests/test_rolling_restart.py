"""Updating while work goes on: instance after instance, and an older program on newer tables.

ROLLING_RESTART_ROUNDS (normally 10) makes the first of them longer or shorter.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from time import monotonic

import pytest

from tests.contract import STOPS_WITHIN_S
from tests.factories import make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, Receiver, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

INSTANCES = 3
ROUNDS = int(os.environ.get("ROLLING_RESTART_ROUNDS", "10"))
ROUND_TAKES_S = 60  # on two cores that do everything for others as well; normally 3

REQUESTS_PER_S = 500
REQUESTS_AT_ONCE = 50

# What a program of a later release may do to the tables: it only adds.
NEWER_TABLES = """
ALTER TABLE retry_queue ADD COLUMN tenant text NOT NULL DEFAULT 'all';
ALTER TABLE retry_queue_archive ADD COLUMN tenant text NOT NULL DEFAULT 'all';
ALTER TABLE retry_instance ADD COLUMN version text;
CREATE INDEX idx_retry_tenant ON retry_queue (tenant) WHERE status = 'pending';
CREATE TABLE retry_pause (original_queue text PRIMARY KEY);
INSERT INTO retry_schema_version (version, name) VALUES (9999, '9999_newer');
"""


async def ask_steadily(upstream: Upstream, stop: asyncio.Event) -> list[str]:
    """Ask for REQUESTS_PER_S retries a second until told to stop; return their ids."""
    ids: list[str] = []
    began_s = monotonic()
    while not stop.is_set():
        batch = [new_id() for _ in range(REQUESTS_AT_ONCE)]
        await asyncio.to_thread(upstream.ask_for_many, [make_request(message_id=id_) for id_ in batch])
        ids += batch
        pause_s = max(began_s + len(ids) / REQUESTS_PER_S - monotonic(), 0)
        await asyncio.sleep(pause_s)  # noqa: TID251  the rate of the load
    return ids


@pytest.mark.timeout(60 + ROUND_TAKES_S * ROUNDS)
async def test_restarting_one_instance_after_another_under_load_loses_nothing_and_doubles_nothing(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    record_property: Callable[[str, object], None],
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    services = await asyncio.gather(*(start_service(RABBITMQ_PREFETCH="100") for _ in range(INSTANCES)))
    stop_asking = asyncio.Event()
    stopped_after_s: list[float] = []

    with Receiver(upstream, "orders") as receiver:
        began_s = monotonic()
        asking = asyncio.create_task(ask_steadily(upstream, stop_asking))
        for _ in range(ROUNDS):
            for service in services:
                received = len(receiver)
                await eventually(lambda: len(receiver) > received + REQUESTS_AT_ONCE)  # noqa: B023
                stopping_s = monotonic()
                assert await service.stop() == 0
                stopped_after_s.append(monotonic() - stopping_s)
                service.start()
                await service.wait_until_ready()
        stop_asking.set()
        ids = await asking
        asked_per_s = len(ids) / (monotonic() - began_s)
        await eventually(lambda: len(receiver) >= len(ids), within=timedelta(seconds=30))
        await eventually(table.settled)

    record_property("restarts", len(stopped_after_s))
    record_property("longest_stop_s", round(max(stopped_after_s), 2))
    record_property("requests", len(ids))
    record_property("requests_per_s", round(asked_per_s))
    delivered = Counter(message.retry_id for message in receiver.messages)
    assert delivered == dict.fromkeys((f"{message_id}:0" for message_id in ids), 1)
    assert await table.statuses() == {"retried": len(ids)}
    assert upstream.depth("orders") == upstream.depth(RETRY_QUEUE) == 0
    assert max(stopped_after_s) < STOPS_WITHIN_S
    for service in services:
        assert "Retry settled by another instance" not in service.log_text()
        assert "An instance has stopped beating" not in service.log_text()


async def test_an_older_program_goes_on_and_starts_again_on_newer_tables(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    upstream.declare("orders")
    service = await start_service()
    upstream.ask(make_request())
    await upstream.filled("orders", 1)

    for statement in filter(str.strip, NEWER_TABLES.split(";")):
        await table.fetch(statement)
    upstream.ask(make_request(), make_request(max_retries=0), b"no request")
    await upstream.filled("orders", 2)
    assert await service.stop() == 0
    service.start()
    await service.wait_until_ready()
    upstream.ask(make_request())
    await upstream.filled("orders", 3)

    await eventually(table.settled)
    assert await table.statuses() == {"retried": 3, "failed": 1}
    assert not [event for event in service.log_events() if event["level"] in ("ERROR", "CRITICAL")]
