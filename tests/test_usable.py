"""Whether it can do its work is more than servers that answer: tables, rights, a beat, every part alive."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.broker.publish_link import PublishLink
from retry_scheduler.database import Database, DatabaseAddress
from retry_scheduler.demo.ports import LOOPBACK, free_ports
from retry_scheduler.demo.private_postgres import PrivatePostgres
from retry_scheduler.errors import StatementRefused, Unavailable, UnusableSchema
from retry_scheduler.observability.live import LiveFigures
from retry_scheduler.observability.metrics_server import MetricsServer
from retry_scheduler.repository import Repository
from retry_scheduler.schema import INSPECT_WITHIN_S, inspect, migrate
from retry_scheduler.service import Service
from retry_scheduler.settings import load_settings
from tests import servers
from tests.factories import make_request
from tests.service_process import MakeService, StartService
from tests.table import Table
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

BREAKAGES = [
    pytest.param(
        "ALTER TABLE retry_queue RENAME TO elsewhere",
        "ALTER TABLE elsewhere RENAME TO retry_queue",
        "lacks table retry_queue",
        id="table renamed",
    ),
    pytest.param(
        "REVOKE INSERT ON retry_payload FROM {role}",
        "GRANT INSERT ON retry_payload TO {role}",
        "lacks INSERT on retry_payload",
        id="right revoked",
    ),
]


def address_of(where: servers.Database) -> DatabaseAddress:
    return DatabaseAddress(where.host, where.port, where.name, where.user, where.password, tls=False)


@pytest.fixture
async def opened(database: servers.Database) -> AsyncIterator[Database]:
    """The test's database, migrated, with an open pool."""
    pool = Database(address_of(database), pool_min=1, pool_max=3)
    await migrate(pool)
    await pool.open()
    yield pool
    await pool.close()


@pytest.mark.parametrize(("breaking", "mending", "problem"), BREAKAGES)
async def test_a_missing_table_or_right_shows_on_every_page_by_name_and_mending_it_is_enough(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    breaking: str,
    mending: str,
    problem: str,
) -> None:
    service = await start_service()
    upstream.declare("orders")
    role = table.database.user

    await table.fetch(breaking.format(role=role))
    health, ready, metrics = service.health(), service.ready(), service.metrics()
    await table.fetch(mending.format(role=role))
    await service.wait_until_ready(within=timedelta(seconds=5))
    upstream.ask(make_request())
    await upstream.receive("orders", 1)

    assert (health.status, ready.status) == (503, 503)
    assert health.body["checks"]["postgresql"] == {"status": "down", "problem": problem}
    assert metrics.value("service_up") == 0


async def test_an_instance_whose_beat_does_not_reach_the_register_is_not_ready_and_says_so(
    start_service: StartService, table: Table
) -> None:
    service = await start_service()
    await table.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no beats today'; END $$"
    )

    await table.fetch("CREATE TRIGGER refuse BEFORE UPDATE ON retry_instance EXECUTE FUNCTION refuse()")
    await eventually(lambda: service.ready().status == 503)
    ready, health = service.ready(), service.health()
    metrics = service.metrics()
    await table.fetch("DROP TRIGGER refuse ON retry_instance")
    await service.wait_until_ready(within=timedelta(seconds=5))

    assert "beat" in ready.body["reason"]
    assert health.status == 200  # both servers are well
    assert metrics.value("service_up") == 0


async def test_while_postgresql_is_away_at_the_start_the_broker_is_seen_as_it_is_and_nothing_is_consumed(
    make_service: MakeService, upstream: Upstream, postgres: PrivatePostgres
) -> None:
    upstream.declare(RETRY_QUEUE, REVIEW_QUEUE, "orders")
    upstream.ask(make_request())
    service = make_service()
    postgres.stop()

    service.start()
    await eventually(
        lambda: service.health().body["checks"]["rabbitmq"] == {"status": "up"}, within=timedelta(seconds=10)
    )
    health, metrics = service.health(), service.metrics()
    waiting = upstream.depth(RETRY_QUEUE)
    postgres.start()
    await service.wait_until_ready()
    depth_once_ready = "retry_queue_depth" in service.metrics().names
    await upstream.receive("orders", 1)

    assert health.status == 503
    assert health.body["checks"]["postgresql"]["status"] == "down"
    assert "retry_queue_depth" not in metrics.names  # nothing was counted: 0 would be a lie
    assert waiting == 1
    assert depth_once_ready


async def test_many_who_ask_at_once_about_a_server_share_one_connection(
    opened: Database, table: Table
) -> None:
    await asyncio.gather(*(opened.probe() for _ in range(200)))

    sessions = await table.value(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'retry-scheduler'"
    )
    assert sessions == 1


async def test_a_probe_of_a_frozen_server_ends_in_time_for_all_who_wait(
    opened: Database, postgres: PrivatePostgres
) -> None:
    postgres.freeze()
    began = asyncio.get_running_loop().time()

    outcomes = await asyncio.gather(*(opened.probe() for _ in range(20)), return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {Unavailable}
    assert asyncio.get_running_loop().time() - began < 2


async def test_depth_and_the_oldest_due_row_are_counted(opened: Database, table: Table) -> None:
    repository = Repository(opened)
    empty = await repository.queue_figures()
    await table.fetch(
        "INSERT INTO retry_queue (message_id, original_queue, retry_count, max_retries, next_retry_at,"
        " status, payload_bytes)"
        " SELECT gen_random_uuid(), 'orders', 0, 3, now() - n * interval '1 s', status, 0"
        " FROM generate_series(1, 50) AS n, (VALUES ('pending'), ('retried')) AS stati (status)"
    )

    depth, oldest_due_s = await repository.queue_figures()

    assert empty == (0, 0.0)
    assert depth == 50
    assert 50 <= oldest_due_s < 60


async def test_a_count_that_failed_is_repeated_soon_and_a_long_one_is_not() -> None:
    outcomes: list[tuple[int, float] | Unavailable] = [Unavailable("PostgreSQL", "away"), (7, 0.0), (8, 0.0)]

    async def count() -> tuple[int, float]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Unavailable):
            raise outcome
        await asyncio.sleep(0.1)  # noqa: TID251  how long a count takes
        return outcome

    async def check() -> None:
        return

    live = LiveFigures(asyncio.get_running_loop(), count=count, check=check)
    first = await asyncio.to_thread(live.queue)
    second = await eventually(lambda: asyncio.to_thread(live.queue), within=timedelta(seconds=1))
    third = await asyncio.to_thread(live.queue)

    assert first is None
    assert second == (7, 0.0)
    assert third is None
    assert outcomes == [(8, 0.0)]


async def test_at_run_time_a_missing_table_is_waited_for(opened: Database, table: Table) -> None:
    await table.fetch("ALTER TABLE retry_queue RENAME TO elsewhere")

    with pytest.raises(Unavailable) as refusal:
        await opened.fetch("queue_figures")

    assert isinstance(refusal.value, StatementRefused)
    assert refusal.value.sqlstate == "42P01"


async def test_tables_lost_after_the_migration_are_named(opened: Database, table: Table) -> None:
    await table.fetch("ALTER TABLE retry_quarantine RENAME TO elsewhere")

    with pytest.raises(UnusableSchema, match="table retry_quarantine"):
        await migrate(opened)


async def test_a_link_that_falls_silent_after_connecting_does_not_hold_up_the_start(
    opened: Database, postgres: PrivatePostgres
) -> None:
    with pytest.raises(Unavailable, match="no answer in time"):
        async with opened.session(within_s=0.5) as connection:
            postgres.freeze()
            await connection.fetchval("SELECT 1")

    assert INSPECT_WITHIN_S <= 10


async def test_looking_at_the_tables_changes_nothing(database: servers.Database, table: Table) -> None:
    state = await inspect(Database(address_of(database), pool_min=0, pool_max=1))

    assert [migration.version for migration in state.missing][:1] == [1]
    assert (state.may_create, state.problem) == (True, None)
    assert await table.fetch("SELECT 1 FROM pg_tables WHERE tablename LIKE 'retry%'") == []


@pytest.mark.parametrize("part", ["publish link", "intake link", "pages", "metrics"])
async def test_a_part_that_dies_takes_the_service_down_loudly(
    database: servers.Database, broker_url: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    http_port, metrics_port = free_ports(2)
    service = Service(
        load_settings(
            {
                "HTTP_HOST": LOOPBACK,
                "HTTP_PORT": str(http_port),
                "METRICS_PORT": str(metrics_port),
                "RABBITMQ_URL": broker_url,
                "POSTGRES_HOST": database.host,
                "POSTGRES_PORT": str(database.port),
                "POSTGRES_DB": database.name,
                "POSTGRES_USER": database.user,
                "POSTGRES_PASSWORD": database.password,
                "POSTGRES_POOL_MIN": "1",
            }
        )
    )

    async def die(*_: object, **__: object) -> None:
        raise ZeroDivisionError(part)

    def die_in_a_thread(_: object) -> None:
        raise ZeroDivisionError(part)

    if part == "pages":
        monkeypatch.setattr("retry_scheduler.http_api.HealthServer.serve", die)
    elif part == "metrics":
        monkeypatch.setattr(MetricsServer, "service_actions", die_in_a_thread)
    else:
        monkeypatch.setattr(PublishLink if part == "publish link" else IntakeLink, "run", die)

    with pytest.raises(ExceptionGroup) as group:
        async with asyncio.timeout(20):
            await service.run()

    assert [type(error) for error in group.value.exceptions] == [ZeroDivisionError]
