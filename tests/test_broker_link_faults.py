"""The way to RabbitMQ: peers that fall silent, connections cut in the middle of a frame, slow links.

Each fault is provoked under load, and costs no message, no hot loop, and no more than 5 s after its end.
"""

import asyncio
import random
from datetime import timedelta
from time import time

import pytest

from chaos.proxy import Way, proxies
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import ANSWERS_WITHIN_S, HEALED_WITHIN_S, MOST_DUPLICATES
from tests.scene import Scene
from tests.service_process import StartService
from tests.table import Table
from tests.under_load import (
    INTAKE_LOST,
    PUBLISHER_LOST,
    Report,
    Watch,
    accounts,
    copies,
    first_retry_s,
    flowing,
    open_files,
    ready_again,
    requests,
    through,
)
from tests.upstream import RETRY_QUEUE, Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

# Heartbeats every 10 s: a silent peer is found after three at the latest.
SILENCE_FOUND_WITHIN = timedelta(seconds=33)

# To tell pauses that grow from a loop that runs hot.
LONG_ENOUGH_S = 4


async def both_links_lost(watch: Watch) -> None:
    await eventually(
        lambda: watch.first_complaint_s(INTAKE_LOST) and watch.first_complaint_s(PUBLISHER_LOST),
        within=SILENCE_FOUND_WITHIN,
        every=timedelta(milliseconds=200),
    )


@pytest.mark.timeout(150)
async def test_a_frozen_broker_is_found_out_and_given_up_and_costs_nothing_when_it_thaws(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    record_property: Report,
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    service = await start_service(RABBITMQ_PREFETCH="100")

    with Load(upstream, requests(), per_second=200) as load:
        await flowing(service)
        watch = Watch(service)
        rabbitmq.freeze()
        await both_links_lost(watch)
        health = service.health()
        rabbitmq.thaw()
        thawed_at = time()
        watch.assert_calm()
        recovered_s = await first_retry_s(table, thawed_at)
        await flowing(service)
        messages = await accounts(load, upstream, table, [service])

    record_property("intake_found_it_after_s", watch.first_complaint_s(INTAKE_LOST))
    record_property("publisher_found_it_after_s", watch.first_complaint_s(PUBLISHER_LOST))
    record_property("first_retry_after_thaw_s", recovered_s)
    record_property("duplicates", copies(messages))
    assert health.status == 503
    assert health.took_s < ANSWERS_WITHIN_S
    assert recovered_s <= HEALED_WITHIN_S
    assert copies(messages) <= MOST_DUPLICATES


@pytest.mark.timeout(150)
async def test_links_that_fall_silent_one_way_or_both_are_found_out_and_given_up(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
    record_property: Report,
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(*[rabbitmq.port] * 3) as links, Load(upstream, requests(), per_second=150) as load:
        services = await asyncio.gather(
            *(start_service(RABBITMQ_URL=through(link, vhost), RABBITMQ_PREFETCH="50") for link in links)
        )
        for service in services:
            await flowing(service, count=20)
        watches = [Watch(service) for service in services]
        both, from_us, to_us = links
        both.hold()
        from_us.hold(Way.TO_SERVER)
        to_us.hold(Way.TO_CLIENT)
        # One after the other would take three times as long.
        await asyncio.gather(*(both_links_lost(watch) for watch in watches))
        healths = [service.health() for service in services]
        for watch in watches:
            watch.assert_calm()
        tries = [link.accepted for link in links]
        for link in links:
            link.heal()
        healed_at = time()
        ready_s = await ready_again(*services)
        for service in services:
            await flowing(service, count=20)
        recovered_s = await first_retry_s(table, healed_at)
        counted = [
            service.metrics().value("retry_reconnects_total", server="RabbitMQ") for service in services
        ]
        messages = await accounts(load, upstream, table, services)

    for name, watch in zip(("both", "from_us", "to_us"), watches, strict=True):
        record_property(f"{name}_intake_s", watch.first_complaint_s(INTAKE_LOST))
        record_property(f"{name}_publisher_s", watch.first_complaint_s(PUBLISHER_LOST))
    record_property("first_retry_after_heal_s", recovered_s)
    record_property("ready_after_heal_s", ready_s)
    record_property("duplicates", copies(messages))
    assert {health.status for health in healths} == {503}
    assert max(health.took_s for health in healths) < ANSWERS_WITHIN_S
    assert max(tries) < 40, "no pause between the tries to connect"
    assert min(counted) >= 2, "that both links were lost cannot be seen in the metrics"
    assert recovered_s <= HEALED_WITHIN_S
    assert copies(messages) <= 3 * MOST_DUPLICATES


@pytest.mark.timeout(120)
async def test_connections_cut_in_the_middle_of_a_frame_lose_nothing_and_damage_nothing(
    scene: Scene, record_property: Report
) -> None:
    dice = random.Random()
    cuts = [(dice.randrange(1, 20_000), dice.choice(list(Way))) for _ in range(20)]
    async with scene.under_load(behind="RabbitMQ", payload_bytes=3000) as flow:
        watch, before = Watch(flow.service), open_files(flow.service)
        for count, way in cuts:
            flow.link.cut_after(count, way)
            await eventually(lambda: flow.link.has_cut)
            await flow.goes_on(count=10)
        seconds = watch.lasted_s
        messages = await flow.accounts()
        after = open_files(flow.service)

    record_property("cuts_in_s", round(seconds, 1))
    record_property("duplicates", copies(messages))
    assert copies(messages) <= MOST_DUPLICATES * len(cuts)
    assert after <= before + 10, "sockets pile up"
    assert len({message.retry_id for message in messages}) >= 200


@pytest.mark.timeout(120)
async def test_resets_of_every_connection_again_and_again_leave_nothing_behind(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
    record_property: Report,
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(rabbitmq.port) as (link,), Load(upstream, requests(), per_second=200) as load:
        service = await start_service(RABBITMQ_URL=through(link, vhost), RABBITMQ_PREFETCH="100")
        await flowing(service, count=200)
        files, memory, watch = open_files(service), service.rss_bytes, Watch(service)
        for _ in range(15):
            await flowing(service, count=20)
            link.reset()
        for _ in range(25):  # also before it is connected again
            link.reset()
            await asyncio.sleep(0.1)  # noqa: TID251  the rhythm is the fault
        link.refuse()
        refusal = Watch(service)
        await eventually(lambda: service.health().status == 503)
        await eventually(
            lambda: refusal.complaints().total() >= 6 and refusal.lasted_s > LONG_ENOUGH_S,
            within=timedelta(seconds=15),
        )
        record_property(
            "tries_per_s_while_refused", round(refusal.complaints().total() / refusal.lasted_s, 1)
        )
        refusal.assert_calm()
        watch.assert_calm()
        link.heal()
        healed_at = time()
        recovered_s = await first_retry_s(table, healed_at)
        messages = await accounts(load, upstream, table, [service])

    record_property("first_retry_after_refusal_s", recovered_s)
    record_property("duplicates", copies(messages))
    assert recovered_s <= HEALED_WITHIN_S
    assert open_files(service) <= files + 10, "sockets pile up"
    assert service.rss_bytes <= memory * 1.2


async def test_links_that_are_slow_or_pass_byte_after_byte_only_delay(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    rabbitmq: PrivateRabbitMQ,
    vhost: str,
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    with proxies(rabbitmq.port, table.database.port) as links:
        to_rabbitmq, to_postgres = links
        for link in links:
            link.slow_down(slice_bytes=1)
        service = await start_service(
            RABBITMQ_URL=through(to_rabbitmq, vhost), POSTGRES_PORT=str(to_postgres.port)
        )
        with Load(upstream, requests(payload_bytes=1000), per_second=20) as load:
            await flowing(service, count=20)
            for link in links:
                link.slow_down(latency_s=0.05)
            await flowing(service, count=20)
            page = service.ready()
            for link in links:
                link.slow_down(bytes_per_s=200_000)
            await flowing(service, count=20)
            for link in links:
                link.heal()
            messages = await accounts(load, upstream, table, [service], payload_bytes=1000)
        reconnects = service.metrics().value("retry_reconnects_total")

    assert page.status == 200
    assert copies(messages) == 0
    assert reconnects == 0
