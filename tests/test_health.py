"""GET /health and GET /ready: true, quick whatever hangs, without secrets. Starting before the servers do."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from retry_scheduler.demo.ports import LOOPBACK
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.demo.private_rabbitmq import PrivateRabbitMQ
from tests.contract import ANSWERS_WITHIN_S
from tests.factories import make_request
from tests.service_process import MakeService, ServiceProcess, StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

UP = {"status": "up"}

Server = PrivatePostgres | PrivateRabbitMQ


@dataclass(frozen=True)
class Outage:
    """A way for a server to be away. check: its name in the answers."""

    check: str
    server: Callable[[PrivatePostgres, PrivateRabbitMQ], Server]
    begin: Callable[[Server], None]
    end: Callable[[Server], None]


def postgres_of(postgres: PrivatePostgres, _: PrivateRabbitMQ) -> Server:
    return postgres


def rabbitmq_of(_: PrivatePostgres, rabbitmq: PrivateRabbitMQ) -> Server:
    return rabbitmq


OUTAGES = [
    pytest.param(
        Outage("postgresql", postgres_of, lambda s: s.stop(), lambda s: s.start()), id="postgres stopped"
    ),
    pytest.param(
        Outage("postgresql", postgres_of, lambda s: s.freeze(), lambda s: s.thaw()), id="postgres frozen"
    ),
    pytest.param(
        Outage("rabbitmq", rabbitmq_of, lambda s: s.stop(), lambda s: s.start()), id="rabbitmq stopped"
    ),
    pytest.param(
        Outage("rabbitmq", rabbitmq_of, lambda s: s.freeze(), lambda s: s.thaw()), id="rabbitmq frozen"
    ),
]


async def test_with_both_servers_well_the_pages_say_so(start_service: StartService) -> None:
    service = await start_service()

    health, ready = service.health(), service.ready()

    checks = {"postgresql": UP, "rabbitmq": UP}
    assert (health.status, health.body) == (
        200,
        {"status": "healthy", "service": "retry-scheduler", "checks": checks},
    )
    assert (ready.status, ready.body) == (
        200,
        {"status": "ready", "service": "retry-scheduler", "checks": checks},
    )
    assert service.metrics().value("service_up", service="retry-scheduler") == 1


@pytest.mark.parametrize("outage", OUTAGES)
async def test_a_server_that_is_away_makes_health_503_within_2_s_and_coming_back_makes_it_200(
    start_service: StartService,
    upstream: Upstream,
    postgres: PrivatePostgres,
    rabbitmq: PrivateRabbitMQ,
    outage: Outage,
) -> None:
    service = await start_service()
    upstream.declare("orders")
    server = outage.server(postgres, rabbitmq)

    outage.begin(server)
    pages = [service.health(), service.ready(), service.health()]
    await eventually(lambda: service.metrics().value("service_up") == 0)
    later = service.health()
    outage.end(server)
    await eventually(lambda: service.health().status == 200, within=timedelta(seconds=15))
    await eventually(lambda: service.ready().status == 200, within=timedelta(seconds=5))
    await eventually(lambda: service.metrics().value("service_up") == 1)
    upstream.ask(make_request())
    await upstream.receive("orders", 1)

    assert max(page.took_s for page in [*pages, later]) < ANSWERS_WITHIN_S
    assert [page.status for page in [*pages, later]] == [503] * 4
    assert [page.body["status"] for page in pages] == ["unhealthy", "not_ready", "unhealthy"]
    for page in pages:
        (other,) = page.body["checks"].keys() - {outage.check}
        assert page.body["checks"][outage.check]["status"] == "down"
        assert page.body["checks"][outage.check]["problem"]
        assert page.body["checks"][other] == UP
        assert "guest" not in json.dumps(page.body)


async def test_with_both_servers_frozen_every_answer_still_comes_within_2_s(
    start_service: StartService, postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ
) -> None:
    service = await start_service()
    postgres.freeze()
    rabbitmq.freeze()

    pages = await asyncio.gather(
        *(asyncio.to_thread(page) for page in (service.health, service.ready) for _ in range(10))
    )

    assert {page.status for page in pages} == {503}
    assert max(page.took_s for page in pages) < ANSWERS_WITHIN_S
    assert {check["status"] for page in pages for check in page.body["checks"].values()} == {"down"}


@pytest.mark.parametrize("outage", OUTAGES)
async def test_the_service_starts_while_a_server_is_away_and_is_ready_soon_after_it_comes(
    make_service: MakeService,
    upstream: Upstream,
    postgres: PrivatePostgres,
    rabbitmq: PrivateRabbitMQ,
    outage: Outage,
) -> None:
    service = make_service()
    server = outage.server(postgres, rabbitmq)
    event = {"postgresql": "PostgreSQL health check failed", "rabbitmq": "Failed to connect to RabbitMQ"}[
        outage.check
    ]
    outage.begin(server)

    service.start()
    await eventually(lambda: service.health().status == 503, within=timedelta(seconds=10))
    await eventually(lambda: len(service.log_events(event)) >= 2, within=timedelta(seconds=30))
    health, ready = service.health(), service.ready()
    reconnects = service.metrics().value("retry_reconnects_total")
    warnings = [entry for entry in service.log_events() if entry["level"] != "INFO"]
    outage.end(server)
    await service.wait_until_ready(within=timedelta(seconds=10))
    upstream.declare("orders")
    upstream.ask(make_request())
    await upstream.receive("orders", 1)

    assert (health.status, ready.status) == (503, 503)
    assert health.took_s < ANSWERS_WITHIN_S
    assert ready.body["status"] == "not_ready"
    assert {entry["level"] for entry in warnings} == {"WARNING"}
    # One warning a try: neither silence nor a flood.
    assert abs(len(warnings) - reconnects) <= 2
    assert service.health().status == 200


async def test_the_service_creates_its_tables_and_queues_and_uses_them_when_they_are_there(
    start_service: StartService, upstream: Upstream, table: Table
) -> None:
    service = await start_service()
    first = await table.fetch("SELECT * FROM retry_schema_version")
    queues = [upstream.exists(queue) for queue in (RETRY_QUEUE, REVIEW_QUEUE)]
    await service.stop()

    await start_service()

    assert queues == [True, True]
    assert len(first) >= 1
    assert await table.fetch("SELECT * FROM retry_schema_version") == first


async def test_five_instances_that_start_at_once_on_an_empty_database_all_come_up(
    make_service: MakeService, table: Table
) -> None:
    services = [make_service() for _ in range(5)]

    for service in services:
        service.start()
    await asyncio.gather(*(service.wait_until_ready(within=timedelta(seconds=40)) for service in services))

    assert await table.value("SELECT count(*) FROM retry_schema_version") == 1
    assert await table.value("SELECT count(*) FROM retry_instance WHERE gone_at IS NULL") == 5


async def test_sessions_that_take_no_writes_are_not_healthy_and_are_given_up_for_ones_that_do(
    start_service: StartService, postgres: PrivatePostgres, upstream: Upstream, table: Table
) -> None:
    """After a failover the old primary may stay reachable, read only, on connections opened before."""
    service = await start_service()
    upstream.declare("orders")
    name = table.database.name
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE datname = '{name}' AND application_name = 'retry-scheduler'"
    )
    await eventually(lambda: "writes" in service.health().body["checks"]["postgresql"].get("problem", ""))
    upstream.ask(make_request())

    postgres.sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await eventually(lambda: service.health().status == 200)

    await upstream.receive("orders", 1, within=timedelta(seconds=5))
    assert service.is_running


async def test_a_broker_with_an_alarm_blocks_publishing_but_not_intake_and_shows(
    start_service: StartService, upstream: Upstream, rabbitmq: PrivateRabbitMQ, table: Table
) -> None:
    service = await start_service()
    upstream.declare("orders")
    upstream.ask(*[make_request(retry_after_ms=1000) for _ in range(5)])
    await eventually(lambda: service.metrics().value("retries_scheduled_total") == 5)

    rabbitmq.eval("rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []}).")
    try:
        await eventually(lambda: service.metrics().value("retry_oldest_due_seconds") > 0)
        await eventually(lambda: service.health().status == 503)
        page = service.health()
        blocked = service.metrics().value("retry_broker_blocked")
    finally:
        rabbitmq.eval("rabbit_alarm:clear_alarm({resource_limit, memory, node()}).")
    await upstream.receive("orders", 5)

    assert "alarm" in page.body["checks"]["rabbitmq"]["problem"]
    assert blocked == 1
    await eventually(lambda: service.health().status == 200)
    assert service.metrics().value("retry_broker_blocked") == 0
    assert service.metrics().value("retry_publications_unknown_total") == 0
    assert service.metrics().value("retry_reconnects_total") == 0
    await eventually(table.settled)


def status_of(service: ServiceProcess, path: str, method: str = "GET") -> int:
    request = urllib.request.Request(f"http://{LOOPBACK}:{service.http_port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            status: Any = answer.status
    except urllib.error.HTTPError as refusal:
        with refusal:
            status = refusal.code
    return int(status)


async def test_there_are_no_other_pages_and_no_other_methods(start_service: StartService) -> None:
    service = await start_service()

    assert status_of(service, "/") == status_of(service, "/docs") == status_of(service, "/metrics") == 404
    assert status_of(service, "/health", "POST") == status_of(service, "/ready", "DELETE") == 405
