"""The way to PostgreSQL: links that fall silent, answers cut off, sessions terminated, a pool of one.

Each fault is provoked under load, and costs no message, no hot loop, and no more than 5 s after its end.
"""

import asyncio
import random
from collections import Counter
from datetime import timedelta
from time import time

import pytest

from chaos.proxy import Way, proxies
from retry_scheduler import database as database_module
from retry_scheduler.database import CALL_TIMEOUT_S, DatabaseAddress
from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.errors import Unavailable
from retry_scheduler.repository import LONG_AGO
from retry_scheduler.schema import migrate
from tests.contract import ANSWERS_WITHIN_S, HEALED_WITHIN_S, MOST_DUPLICATES
from tests.factories import make_request, new_id
from tests.malformed import MALFORMED
from tests.scene import Scene
from tests.servers import Database
from tests.service_process import StartService
from tests.table import Table
from tests.under_load import (
    Report,
    Watch,
    accounts,
    copies,
    flowing,
    open_files,
    ready_again,
    requests,
)
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

OURS = "application_name = 'retry-scheduler' AND datname = current_database()"


@pytest.mark.timeout(120)
async def test_links_that_fall_silent_one_way_or_both_are_given_up_and_others_take_over(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    with (
        proxies(*[table.database.port] * 3) as links,
        Load(upstream, requests(), per_second=150) as load,
    ):
        cut_off = await asyncio.gather(
            *(start_service(POSTGRES_PORT=str(link.port), RABBITMQ_PREFETCH="20") for link in links)
        )
        healthy = await start_service(RABBITMQ_PREFETCH="20")
        for service in (*cut_off, healthy):
            await flowing(service, count=20)
        files = [open_files(service) for service in cut_off]
        watches = [Watch(service) for service in cut_off]
        links[0].hold()
        links[1].hold(Way.TO_SERVER)
        links[2].hold(Way.TO_CLIENT)
        for watch in watches:
            await eventually(
                lambda: watch.first_complaint_s("PostgreSQL health check failed"),  # noqa: B023
                within=timedelta(seconds=10),
            )
        await flowing(healthy, count=500)  # and what the others held is among it
        healths = [service.health() for service in cut_off]
        for watch in watches:
            await watch.stays_calm_until(15)
        grown = [open_files(service) - before for service, before in zip(cut_off, files, strict=True)]
        for link in links:
            link.heal()
        await ready_again(*cut_off)
        for service in cut_off:
            await flowing(service, count=20)
        counted = [
            service.metrics().value("retry_reconnects_total", server="PostgreSQL") for service in cut_off
        ]
        messages = await accounts(load, upstream, table, (), most_copies=3 * MOST_DUPLICATES)

    for name, watch in zip(("both", "from_us", "to_us"), watches, strict=True):
        record_property(f"{name}_found_s", watch.first_complaint_s("PostgreSQL health check failed"))
    record_property("duplicates", copies(messages))
    assert {health.status for health in healths} == {503}
    assert max(health.took_s for health in healths) < ANSWERS_WITHIN_S
    assert max(grown) < 10, "sockets pile up"
    assert min(counted) > 0, "the outage cannot be seen in the metrics"


@pytest.mark.timeout(120)
async def test_answers_cut_off_and_sessions_terminated_at_any_moment_cost_nothing_and_double_nothing(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    """Whether a statement was committed is unknown when its answer is lost: repeating it must be harmless."""
    upstream.declare("orders", RETRY_QUEUE)
    dice = random.Random()
    one_of_ours = f"SELECT pid FROM pg_stat_activity WHERE {OURS} ORDER BY random() LIMIT 1"
    terminate_one = f"SELECT pg_terminate_backend(({one_of_ours}))"
    with proxies(table.database.port) as (link,), Load(upstream, requests(), per_second=200) as load:
        service = await start_service(POSTGRES_PORT=str(link.port), RABBITMQ_PREFETCH="100")
        await flowing(service)
        watch = Watch(service)
        for _ in range(25):
            # The very next byte of an answer, or somewhere in the middle of one, or of a statement.
            way = dice.choice(list(Way))
            link.cut_after(dice.choice((0, dice.randrange(1, 3000))), way)
            await eventually(lambda: link.has_cut)
            await flowing(service, count=5)
        for _ in range(25):
            await table.fetch(terminate_one)
            await flowing(service, count=5)
        upstream.ask(MALFORMED[0].body)  # the loop that brings these to people is alive, too
        await upstream.filled(REVIEW_QUEUE, 1)
        record_property("faults_in_s", round(watch.lasted_s, 1))
        await accounts(load, upstream, table, [service], exactly_once=True)


async def test_what_was_stored_without_an_answer_and_executed_meanwhile_is_not_taken_for_another_attempt(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    """The instance repeats the statement; that its rows are there, and done, is its own doing."""
    upstream.declare("orders", "later", RETRY_QUEUE)
    ids = [new_id() for _ in range(50)]
    stored = "SELECT message_id::text, retry_count FROM retry_queue WHERE original_queue = 'later'"
    with proxies(table.database.port) as (link,):
        service = await start_service(
            POSTGRES_PORT=str(link.port), POSTGRES_POOL_MAX="2", RABBITMQ_PREFETCH="100"
        )
        # A statement that its connection does not know yet needs an answer before it is executed.
        with Load(upstream, requests(), per_second=300) as load:
            await flowing(service, count=300, within=timedelta(seconds=20))
        await accounts(load, upstream, table, [service])
        link.hold(Way.TO_CLIENT)
        upstream.ask_for_many(
            [make_request(message_id=message_id, original_queue="later") for message_id in ids]
        )
        # Those that came together: the others wait until these are answered.
        await eventually(lambda: table.fetch(stored))
        executed = await table.fetch(
            "UPDATE retry_queue SET status = 'retried', finished_at = clock_timestamp()"
            " WHERE status = 'pending' RETURNING message_id"
        )
        link.reset()
        link.heal()
        await eventually(lambda: table.value(f"SELECT count(*) >= {len(ids)} FROM ({stored}) AS stored"))
        await eventually(table.settled)
        attempts = await table.fetch(stored)
        repeated = service.metrics().value("retry_duplicates_total")

    assert Counter(map(tuple, attempts)) == Counter((message_id, 0) for message_id in ids)
    assert repeated == 0
    assert len(upstream.take("later")) == len(ids) - len(executed)


async def test_a_pool_of_one_connection_on_a_slow_link_starves_nobody(
    scene: Scene, record_property: Report
) -> None:
    async with scene.under_load(
        behind="PostgreSQL", per_second=100, POSTGRES_POOL_MAX="1", POSTGRES_POOL_MIN="1"
    ) as flow:
        flow.link.slow_down(latency_s=0.02)
        watch = Watch(flow.service)
        await flow.goes_on(count=500, within=timedelta(seconds=20))
        pages = [flow.service.ready() for _ in range(10)]
        flow.service.metrics()
        await flow.accounts(exactly_once=True)

    record_property("slowest_page_s", round(max(page.took_s for page in pages), 2))
    assert {page.status for page in pages} == {200}
    assert watch.complaints().total() == 0


async def test_connections_that_a_firewall_has_forgotten_are_all_given_up_at_the_first_sign(
    scene: Scene, record_property: Report
) -> None:
    """Nobody says that they are dead. Found out one after the other, each would take six seconds."""
    async with scene.under_load(behind="PostgreSQL", POSTGRES_POOL_MIN="40") as flow:
        flow.link.forget()
        forgotten_at = time()
        recovered_s = await flow.first_retry_s(forgotten_at + 1, within=timedelta(seconds=30))
        await ready_again(flow.service)
        watch = Watch(flow.service)
        await flow.goes_on(count=1000)
        await flow.accounts(exactly_once=True)

    record_property("first_retry_after_s", recovered_s + 1)
    assert recovered_s + 1 <= CALL_TIMEOUT_S + HEALED_WITHIN_S
    assert watch.complaints().total() == 0


async def test_when_one_connection_has_fallen_silent_none_that_is_as_old_is_lent_again(
    database: Database,
) -> None:
    with proxies(database.port) as (link,):
        address = DatabaseAddress(
            LOOPBACK, link.port, database.name, database.user, database.password, tls=False
        )
        pool = database_module.Database(address, pool_min=10, pool_max=10)
        await migrate(pool)
        await pool.open()
        link.forget()

        with pytest.raises(Unavailable, match="no answer in time"):
            await pool.fetch("search_floor", LONG_AGO)
        await asyncio.gather(*(pool.fetch("search_floor", LONG_AGO) for _ in range(10)))

        await pool.close()
