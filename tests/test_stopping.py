"""SIGTERM: what is in hand is finished, the rest is given back, and the process leaves with 0 within 20 s."""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from time import monotonic

import pytest

from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import STOPS_WITHIN_S
from tests.factories import make_request, new_id
from tests.service_process import MakeService, ServiceProcess, StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)


Fault = Callable[[PrivatePostgres, PrivateRabbitMQ], None]


async def stop(service: ServiceProcess) -> float:
    """Send SIGTERM, make sure that the service leaves with 0, and return how long it took."""
    began = monotonic()
    assert await service.stop() == 0
    return monotonic() - began


@pytest.mark.timeout(120)
async def test_stopping_again_and_again_under_load_doubles_nothing_and_loses_nothing(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    record_property: Callable[[str, object], None],
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    ids = [new_id() for _ in range(8000)]
    asking = asyncio.create_task(
        asyncio.to_thread(upstream.ask_for_many, [make_request(message_id=message_id) for message_id in ids])
    )
    took_s = []

    for moment in (300, 1500, 3000, 4500, 6000):
        service = await start_service(RABBITMQ_PREFETCH="100")
        await upstream.filled("orders", moment, within=timedelta(seconds=30))
        took_s.append(await stop(service))
        assert await table.value("SELECT count(*) FROM retry_queue WHERE claimed_until > now()") == 0
        assert await table.value("SELECT count(*) FROM retry_instance WHERE gone_at IS NULL") == 0
    await asking
    await start_service(RABBITMQ_PREFETCH="100")
    await upstream.filled("orders", len(ids), within=timedelta(seconds=30))
    await eventually(table.settled)

    record_property("stopped_after_s", [round(seconds, 2) for seconds in took_s])
    delivered = Counter(message.retry_id for message in upstream.take("orders"))
    assert delivered == dict.fromkeys((f"{message_id}:0" for message_id in ids), 1)
    assert max(took_s) < STOPS_WITHIN_S


@pytest.mark.timeout(120)
async def test_stopping_gives_nothing_back_to_the_broker_that_it_would_take_for_a_redelivery(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    """An upstream that does not count sends an executed attempt again: that is its next failure."""
    upstream.declare("orders", RETRY_QUEUE)
    requests = [make_request(message_id=new_id()) for _ in range(4000)]
    service = await start_service(RABBITMQ_PREFETCH="1000")
    upstream.ask_for_many(requests)
    await upstream.filled("orders", len(requests), within=timedelta(seconds=30))
    await eventually(table.settled)
    await stop(service)

    upstream.ask_for_many(requests)
    for stored in (500, 1500, 2500):
        service = await start_service(RABBITMQ_PREFETCH="100")
        enough = f"SELECT count(*) >= {stored} FROM retry_queue WHERE retry_count = 1"
        await eventually(partial(table.value, enough), within=timedelta(seconds=30))
        await stop(service)
    assert upstream.depth(RETRY_QUEUE) > 0  # otherwise nothing was interrupted
    await start_service(RABBITMQ_PREFETCH="1000")
    await eventually(lambda: upstream.depth(RETRY_QUEUE) == 0, within=timedelta(seconds=30))
    await eventually(table.settled, within=timedelta(seconds=30))

    repeated = await table.value("SELECT count(*) FROM retry_queue WHERE retry_count = 1")
    assert repeated == len(requests)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda postgres, rabbitmq: postgres.stop(), id="postgres stopped"),
        pytest.param(lambda postgres, rabbitmq: rabbitmq.stop(), id="rabbitmq stopped"),
        pytest.param(lambda postgres, rabbitmq: postgres.freeze(), id="postgres frozen"),
        pytest.param(lambda postgres, rabbitmq: rabbitmq.freeze(), id="rabbitmq frozen"),
        pytest.param(lambda postgres, rabbitmq: (postgres.freeze(), rabbitmq.freeze()), id="both frozen"),
    ],
)
async def test_a_server_that_is_away_does_not_keep_the_service_from_stopping(
    start_service: StartService,
    upstream: Upstream,
    postgres: PrivatePostgres,
    rabbitmq: PrivateRabbitMQ,
    fault: Fault,
    record_property: Callable[[str, object], None],
) -> None:
    service = await start_service(RABBITMQ_PREFETCH="100")
    upstream.declare("orders")
    upstream.ask_for_many([make_request() for _ in range(3000)])
    await eventually(lambda: service.metrics().value("retries_executed_total") >= 200)

    fault(postgres, rabbitmq)
    took_s = await stop(service)

    record_property("stopped_after_s", round(took_s, 2))
    assert took_s < STOPS_WITHIN_S


async def test_an_idle_service_stops_at_once_and_says_so(
    start_service: StartService, record_property: Callable[[str, object], None]
) -> None:
    service = await start_service()

    took_s = await stop(service)

    record_property("stopped_after_s", round(took_s, 2))
    assert took_s < 3
    assert [event["message"] for event in service.log_events()][-2:] == [
        "Service stopping",
        "Service stopped",
    ]


async def test_a_service_that_still_waits_for_its_servers_stops_at_once(
    make_service: MakeService, postgres: PrivatePostgres
) -> None:
    service = make_service()
    postgres.stop()
    service.start()
    await eventually(lambda: service.health().status == 503, within=timedelta(seconds=10))

    assert await stop(service) < 3


async def test_a_second_signal_leaves_at_once(
    start_service: StartService, upstream: Upstream, postgres: PrivatePostgres
) -> None:
    service = await start_service()
    upstream.declare("orders")
    postgres.freeze()
    upstream.ask(make_request())
    service.terminate()
    await eventually(lambda: service.ready().body.get("reason") == "stopping")
    began = monotonic()

    service.terminate()
    code = await service.wait_until_ended()

    assert monotonic() - began < 2
    assert code != 0  # it did not finish its work


async def test_while_stopping_it_is_not_ready(
    start_service: StartService, upstream: Upstream, postgres: PrivatePostgres
) -> None:
    service = await start_service()
    postgres.freeze()
    upstream.ask(make_request())

    service.terminate()

    await eventually(lambda: service.ready().body.get("reason") == "stopping")
    assert service.ready().status == 503
    postgres.thaw()
    assert await service.wait_until_ended() == 0
