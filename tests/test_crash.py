"""Servers and instances that die under load: nothing is lost, duplicates are few, all heals by itself."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from time import monotonic, time

import asyncpg
import pytest

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import HEALED_WITHIN_S, MOST_DUPLICATES
from tests.factories import make_request, new_id
from tests.service_process import ServiceProcess, StartService
from tests.table import Table
from tests.under_load import Report, copies, first_retry_s
from tests.upstream import RETRY_QUEUE, Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


@dataclass(frozen=True)
class Servers:
    """What a fault may break."""

    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    vhost: str
    upstream: Upstream
    table: Table


@pytest.fixture
def servers(
    postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ, vhost: str, upstream: Upstream, table: Table
) -> Servers:
    upstream.declare("orders", RETRY_QUEUE)
    return Servers(postgres, rabbitmq, vhost, upstream, table)


CLAIM_WAITS = """
    SELECT count(*) > 0 FROM pg_stat_activity
     WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '-- Lend due attempts%'
"""


def endless_requests() -> Iterator[tuple[str, bytes]]:
    while True:
        message_id = new_id()
        yield message_id, make_request(message_id=message_id, max_retries=1000)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("instances", [1, 2])
async def test_kill_9_at_random_moments_loses_nothing_and_doubles_at_most_512_each_time(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report, instances: int
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    dice = random.Random()
    ids = [new_id() for _ in range(8000)]
    services = list(await asyncio.gather(*(start_service(RABBITMQ_PREFETCH="200") for _ in range(instances))))
    moments = sorted(dice.randrange(200, len(ids) - 500) for _ in range(4))
    record_property("killed_after_deliveries", moments)
    asking = asyncio.create_task(
        asyncio.to_thread(upstream.ask_for_many, [make_request(message_id=message_id) for message_id in ids])
    )

    for moment in moments:
        await upstream.filled("orders", moment, within=timedelta(seconds=30), every=timedelta(milliseconds=5))
        victim = dice.choice(services)
        victim.kill()
        victim.start()
        await victim.wait_until_ready()
    await asking
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0, within=timedelta(seconds=20))
    await eventually(table.settled, within=timedelta(seconds=30))

    messages = upstream.take("orders")
    duplicates = copies(messages)
    record_property("duplicates", duplicates)
    # No key but that of the first attempt: what the broker delivered again was stored once.
    assert {message.retry_id for message in messages} == {f"{message_id}:0" for message_id in ids}
    assert duplicates <= MOST_DUPLICATES * len(moments)
    assert await table.statuses() == {"retried": len(ids)}
    assert await table.value("SELECT count(*) FROM retry_payload") == len(ids)


@pytest.mark.timeout(120)
async def test_a_frozen_instance_is_relieved_of_its_rows_and_works_on_when_it_thaws(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    frozen, awake = await asyncio.gather(*(start_service(RABBITMQ_PREFETCH="200") for _ in range(2)))
    ids = [new_id() for _ in range(5000)]
    upstream.ask_for_many([make_request(message_id=message_id, retry_after_ms=1500) for message_id in ids])
    await upstream.filled("orders", 1000, within=timedelta(seconds=20))

    frozen.freeze()
    # What the frozen one has taken from the broker and not stored is still in its hands; all else gets done.
    stored = "SELECT count(*) = 0 FROM retry_queue WHERE status = 'pending'"
    await eventually(lambda: table.value(stored), within=timedelta(seconds=20))
    frozen.thaw()
    await eventually(lambda: frozen.ready().status == 200, within=timedelta(seconds=5))
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0, within=timedelta(seconds=20))
    await eventually(table.settled, within=timedelta(seconds=20))
    more = [new_id() for _ in range(400)]
    before = frozen.metrics().value("retries_executed_total", status="success")
    upstream.ask_for_many([make_request(message_id=message_id) for message_id in more])
    await eventually(table.settled, within=timedelta(seconds=10))
    await eventually(lambda: frozen.metrics().value("retries_executed_total", status="success") > before)
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0)
    await eventually(table.settled, within=timedelta(seconds=10))

    messages = upstream.take("orders")
    record_property("duplicates", copies(messages))
    assert {message.retry_id for message in messages} == {f"{message_id}:0" for message_id in ids + more}
    assert copies(messages) <= MOST_DUPLICATES
    assert await table.statuses() == {"retried": len(ids) + len(more)}
    assert awake.ready().status == 200


@pytest.mark.timeout(60)
async def test_an_instance_that_froze_while_claiming_does_not_publish_what_others_have_taken_over(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    upstream.declare("orders")
    frozen = await start_service(RABBITMQ_PREFETCH="500")
    # A connection that has proven itself is trusted with a batch, and each to PostgreSQL knows the statement:
    # the lock would otherwise hold back its preparation, and the claim would never be sent.
    for _ in range(20):
        upstream.ask_for_many([make_request(retry_after_ms=1) for _ in range(20)])
        await upstream.receive("orders", 20)
    await eventually(table.settled)
    upstream.ask_for_many([make_request(retry_after_ms=2000) for _ in range(50)])
    await eventually(lambda: frozen.metrics().value("retries_scheduled_total") == 450)

    # Not earlier: without beats it would not trust its leases, and not claim.
    soon = "SELECT min(next_retry_at) < now() + interval '0.5 s' FROM retry_queue WHERE status = 'pending'"
    await eventually(lambda: table.value(soon))
    # A lock on the table holds its claim back until it is frozen; then the claim goes through, unseen by it.
    lock = await asyncpg.connect(table.database.dsn)
    async with lock.transaction():
        await lock.execute("LOCK TABLE retry_queue IN ACCESS EXCLUSIVE MODE")
        await eventually(lambda: table.value(CLAIM_WAITS), within=timedelta(seconds=3))
        frozen.freeze()
    await lock.close()
    claimed = "SELECT count(*) FROM retry_queue WHERE claims = 1 AND status = 'pending'"
    await eventually(lambda: table.value(claimed))
    await start_service()
    messages = await upstream.receive("orders", 50)
    frozen.thaw()
    await eventually(lambda: frozen.ready().status == 200)
    await eventually(table.settled)
    assert await frozen.stop() == 0  # so that all it might have sent is there

    messages += upstream.take("orders")
    assert len(messages) == len({message.retry_id for message in messages}) == 50
    assert await table.statuses() == {"retried": 450}


async def kill_postgres(servers: Servers) -> Callable[[], None]:
    servers.postgres.kill()
    return servers.postgres.start


async def stop_postgres(servers: Servers) -> Callable[[], None]:
    servers.postgres.stop()
    return servers.postgres.start


async def freeze_postgres(servers: Servers) -> Callable[[], None]:
    servers.postgres.freeze()
    return servers.postgres.thaw


async def freeze_rabbitmq(servers: Servers) -> Callable[[], None]:
    servers.rabbitmq.freeze()
    return servers.rabbitmq.thaw


async def kill_rabbitmq(servers: Servers) -> Callable[[], None]:
    servers.rabbitmq.kill()
    return servers.rabbitmq.start


async def stop_rabbitmq(servers: Servers) -> Callable[[], None]:
    servers.rabbitmq.stop()
    return servers.rabbitmq.start


def start_app(servers: Servers) -> None:
    servers.rabbitmq.ctl("start_app")


async def stop_app(servers: Servers) -> Callable[[], None]:
    servers.rabbitmq.ctl("stop_app")
    return partial(start_app, servers)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "fault",
    [
        kill_postgres,
        stop_postgres,
        freeze_postgres,
        kill_rabbitmq,
        stop_rabbitmq,
        freeze_rabbitmq,
        stop_app,
    ],
)
async def test_a_server_that_goes_away_under_load_and_comes_back_costs_nothing(
    start_service: StartService,
    servers: Servers,
    record_property: Report,
    fault: Callable[[Servers], Awaitable[Callable[[], None]]],
) -> None:
    upstream, table = servers.upstream, servers.table
    service = await start_service(RABBITMQ_PREFETCH="100")

    with Load(upstream, endless_requests(), per_second=400) as load:
        await upstream.filled("orders", 300, within=timedelta(seconds=20))
        restore = await fault(servers)
        await eventually(lambda: service.health().status == 503)
        await eventually(lambda: service.metrics().value("service_up") == 0)
        restore()
        began, restored_at = monotonic(), time()
        await eventually(lambda: service.ready().status == 200, within=timedelta(seconds=15))
        healed_s = monotonic() - began
        retried_s = await first_retry_s(table, restored_at)
        accepted = len(load.accepted)
        await eventually(lambda: len(load.accepted) >= accepted + 300, within=timedelta(seconds=20))
        load.finish()
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0, within=timedelta(seconds=20))
    await eventually(table.settled, within=timedelta(seconds=20))

    messages = upstream.take("orders")
    record_property("ready_s", round(healed_s, 2))
    record_property("first_retry_s", retried_s)
    record_property("duplicates", copies(messages))
    assert set(load.accepted) - {message.message_id for message in messages} == set()
    assert copies(messages) <= MOST_DUPLICATES
    assert (await table.statuses()).keys() == {"retried"}
    assert healed_s <= HEALED_WITHIN_S
    assert retried_s <= HEALED_WITHIN_S
    assert service.is_running
    await eventually(lambda: service.metrics().value("service_up") == 1)
    assert await service.stop() == 0


async def close_all_connections(servers: Servers, service: ServiceProcess) -> None:
    servers.rabbitmq.ctl("close_all_connections", "--vhost", servers.vhost, "maintenance")


async def terminate_backends(servers: Servers, service: ServiceProcess) -> None:
    await servers.table.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'retry-scheduler' AND datname = current_database()"
    )


async def delete_retry_queue(servers: Servers, service: ServiceProcess) -> None:
    # Only when it is empty: what is deleted with a queue nobody can bring back.
    with servers.upstream.channel() as channel:
        channel.queue_delete(RETRY_QUEUE)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", [close_all_connections, terminate_backends])
async def test_connections_cut_again_and_again_under_load_cost_nothing(
    start_service: StartService,
    servers: Servers,
    record_property: Report,
    fault: Callable[[Servers, ServiceProcess], Awaitable[None]],
) -> None:
    upstream, table = servers.upstream, servers.table
    service = await start_service(RABBITMQ_PREFETCH="100")

    with Load(upstream, endless_requests(), per_second=400) as load:
        for cut in range(1, 6):
            await upstream.filled("orders", cut * 200, within=timedelta(seconds=20))
            await fault(servers, service)
        load.finish()
    await eventually(lambda: service.ready().status == 200, within=timedelta(seconds=10))
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0, within=timedelta(seconds=20))
    # What has been delivered and not stored yet is in neither place.
    stored = f"SELECT count(*) >= {len(load.accepted)} FROM retry_queue"
    await eventually(lambda: table.value(stored), within=timedelta(seconds=20))
    await eventually(table.settled, within=timedelta(seconds=20))

    messages = upstream.take("orders")
    record_property("duplicates", copies(messages))
    assert set(load.accepted) - {message.message_id for message in messages} == set()
    assert copies(messages) <= MOST_DUPLICATES * 5
    assert (await table.statuses()).keys() == {"retried"}
    assert await service.stop() == 0


async def test_a_retry_queue_deleted_at_run_time_is_declared_again_and_consumed_again(
    start_service: StartService, servers: Servers
) -> None:
    service = await start_service()
    await delete_retry_queue(servers, service)

    await eventually(lambda: servers.upstream.exists(RETRY_QUEUE), within=timedelta(seconds=5))
    servers.upstream.ask(make_request())
    await servers.upstream.receive("orders", 1, within=timedelta(seconds=5))

    assert service.ready().status == 200
    assert service.metrics().value("retry_reconnects_total", server="RabbitMQ") == 1
    assert service.metrics().value("retry_reconnects_total", server="PostgreSQL") == 0


async def test_what_was_accepted_while_the_service_was_down_is_delivered_when_it_is_up(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    service = await start_service()
    pending = [new_id() for _ in range(50)]
    upstream.ask_for_many(
        [make_request(message_id=message_id, retry_after_ms=2000) for message_id in pending]
    )
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 50)
    service.kill()
    waiting = [new_id() for _ in range(50)]
    upstream.ask_for_many([make_request(message_id=message_id) for message_id in waiting])

    service.start()
    messages = await upstream.receive("orders", 100, within=timedelta(seconds=10))
    await eventually(table.settled)

    assert sorted(message.message_id for message in messages) == sorted(pending + waiting)
