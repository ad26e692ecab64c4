"""PostgreSQL in trouble: crashes, locks, deadlocks, full disks, refused logins, settings of strangers.

Each fault is provoked under load, and costs no message, no hot loop, and no more than 5 s after its end.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from time import time

import asyncpg
import pytest

from retry_scheduler.database import Database, DatabaseAddress
from retry_scheduler.demo.postgres_programs import unprivileged_account
from retry_scheduler.demo.private_postgres import PrivatePostgres
from tests.contract import ANSWERS_WITHIN_S, HEALED_WITHIN_S
from tests.factories import encoded, make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.under_load import (
    Report,
    Watch,
    accounts,
    copies,
    first_retry_s,
    flowing,
    payload_of,
    requests,
)
from tests.upstream import RETRY_QUEUE, REVIEW_QUEUE, Load, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

OURS = "application_name = 'retry-scheduler' AND datname = current_database()"


def kill_a_backend(postgres: PrivatePostgres, backend: int) -> None:
    os.kill(backend, signal.SIGKILL)  # the server ends all sessions and recovers by itself


def stop_immediately(postgres: PrivatePostgres, backend: int) -> None:
    os.kill(postgres.pid, signal.SIGQUIT)  # pg_ctl stop -m immediate


@pytest.mark.parametrize("crash", [kill_a_backend, stop_immediately])
async def test_a_crash_of_postgresql_loses_nothing_that_was_acknowledged(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    postgres: PrivatePostgres,
    record_property: Report,
    crash: Callable[[PrivatePostgres, int], None],
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    # The session's own setting must win: without it the crash would take the last acknowledged rows.
    postgres.sql(f"ALTER ROLE {table.database.user} SET synchronous_commit = off")
    service = await start_service(RABBITMQ_PREFETCH="100")

    with Load(upstream, requests(), per_second=300) as load:
        await flowing(service, count=200)
        watch = Watch(service)
        crash(postgres, await table.value(f"SELECT pid FROM pg_stat_activity WHERE {OURS} LIMIT 1"))
        if crash is stop_immediately:
            await eventually(lambda: not postgres.is_running)
            postgres.start()
        await eventually(lambda: table.value("SELECT true"), within=timedelta(seconds=20))
        back_at = time()
        recovered_s = await first_retry_s(table, back_at)
        await flowing(service)
        watch.assert_calm()
        messages = await accounts(load, upstream, table, [service], exactly_once=True)
    postgres.sql(f"ALTER ROLE {table.database.user} RESET synchronous_commit")

    record_property("first_retry_after_return_s", recovered_s)
    record_property("duplicates", copies(messages))
    assert recovered_s <= HEALED_WITHIN_S


async def test_the_settings_of_our_sessions_win_over_those_of_role_and_database(
    start_service: StartService, upstream: Upstream, table: Table, postgres: PrivatePostgres
) -> None:
    name, role = table.database.name, table.database.user
    wanted = {
        "synchronous_commit": "on",
        "TimeZone": "UTC",
        "statement_timeout": "5s",
        "lock_timeout": "2s",
        "idle_in_transaction_session_timeout": "10s",
        "default_transaction_isolation": "read committed",
    }
    unwanted = {"synchronous_commit": "off", "TimeZone": "Europe/Zagreb", "DateStyle": "German"}
    unwanted |= {"default_transaction_isolation": "serializable"}
    unwanted |= dict.fromkeys(
        ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"), "0"
    )
    for setting, value in unwanted.items():
        postgres.sql(f"ALTER ROLE {role} IN DATABASE {name} SET {setting} = '{value}'")
    where = table.database
    ours = Database(
        DatabaseAddress(where.host, where.port, where.name, where.user, where.password, tls=False),
        pool_min=1,
        pool_max=1,
    )

    async with ours.session() as session:
        found = {setting: await session.fetchval(f"SHOW {setting}") for setting in wanted}
    service = await start_service(
        BASE_DELAY_MS="1500", MAX_DELAY_MS="1500", JITTER_MS="0", TZ="Europe/Zagreb"
    )
    upstream.declare("orders")
    upstream.ask(make_request(), make_request(retry_count=3))
    (retry,) = await upstream.receive("orders", 1)
    (review,) = await upstream.receive(REVIEW_QUEUE, 1)
    await eventually(table.settled)
    delay = await table.value("SELECT next_retry_at - created_at FROM retry_queue WHERE status = 'retried'")

    assert found == wanted
    assert timedelta(seconds=1.49) < delay < timedelta(seconds=1.6)  # the row's two times are read apart
    assert retry.headers["x-retry-count"] == 1
    assert review.review["failed_at"].endswith("+00:00")
    assert service.metrics().value("retry_lateness_seconds_sum") < 1


def refuse_login(postgres: PrivatePostgres, role: str) -> None:
    postgres.sql(f"ALTER ROLE {role} NOLOGIN")


def allow_login(postgres: PrivatePostgres, role: str) -> None:
    postgres.sql(f"ALTER ROLE {role} LOGIN")


def refuse_connections(postgres: PrivatePostgres, role: str) -> None:
    postgres.sql(f"ALTER ROLE {role} CONNECTION LIMIT 0")


def allow_connections(postgres: PrivatePostgres, role: str) -> None:
    postgres.sql(f"ALTER ROLE {role} CONNECTION LIMIT -1")


def refuse_writes(postgres: PrivatePostgres, role: str) -> None:
    postgres.sql("ALTER SYSTEM SET default_transaction_read_only = on")
    postgres.sql("SELECT pg_reload_conf()")


def allow_writes(postgres: PrivatePostgres, role: str) -> None:
    postgres.sql("ALTER SYSTEM RESET default_transaction_read_only")
    postgres.sql("SELECT pg_reload_conf()")


@pytest.mark.parametrize(
    ("breaking", "mending", "terminate", "problem"),
    [
        pytest.param(refuse_login, allow_login, True, "SQLSTATE 28000", id="no login"),
        pytest.param(refuse_connections, allow_connections, True, "SQLSTATE 53300", id="no connection left"),
        pytest.param(refuse_writes, allow_writes, False, "SQLSTATE 25006", id="read only"),
    ],
)
async def test_what_postgresql_refuses_at_run_time_is_named_and_waited_for_without_a_flood(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    postgres: PrivatePostgres,
    record_property: Report,
    breaking: Callable[[PrivatePostgres, str], None],
    mending: Callable[[PrivatePostgres, str], None],
    terminate: bool,
    problem: str,
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    service = await start_service(RABBITMQ_PREFETCH="100")
    role, name = table.database.user, table.database.name

    with Load(upstream, requests(), per_second=200) as load:
        await flowing(service)
        watch = Watch(service)
        breaking(postgres, role)
        try:
            if terminate:
                postgres.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    f" WHERE application_name = 'retry-scheduler' AND datname = '{name}'"
                )
            await eventually(lambda: problem in watch.said(), within=timedelta(seconds=5))
            await watch.stays_calm_until(6)
            health = service.health()
        finally:
            mending(postgres, role)
        mended_at = time()
        recovered_s = await first_retry_s(table, mended_at)
        await flowing(service)
        await accounts(load, upstream, table, [service], exactly_once=True)

    record_property("first_retry_after_mending_s", recovered_s)
    assert health.status == 503
    assert recovered_s <= HEALED_WITHIN_S


@asynccontextmanager
async def table_locked(table: Table) -> AsyncIterator[None]:
    """Hold the lock that VACUUM FULL, REINDEX or a migration would hold."""
    stranger = await asyncpg.connect(table.database.dsn)
    try:
        async with stranger.transaction():
            await stranger.execute("LOCK TABLE retry_queue IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await stranger.close()


@pytest.mark.timeout(90)
async def test_a_table_locked_for_longer_than_our_patience_delays_everything_and_doubles_nothing(
    start_service: StartService, upstream: Upstream, table: Table, record_property: Report
) -> None:
    upstream.declare("orders", RETRY_QUEUE)
    services = await asyncio.gather(*(start_service(RABBITMQ_PREFETCH="50") for _ in range(2)))

    with Load(upstream, requests(), per_second=200) as load:
        for service in services:
            await flowing(service)
        watches = [Watch(service) for service in services]
        async with table_locked(table):
            await eventually(lambda: watches[0].lasted_s > 10, within=timedelta(seconds=15))
            healths = [service.health() for service in services]
        unlocked_at = time()
        for watch in watches:
            watch.assert_calm()
        recovered_s = await first_retry_s(table, unlocked_at)
        for service in services:
            await flowing(service)
        await accounts(load, upstream, table, services, exactly_once=True)

    record_property("first_retry_after_unlock_s", recovered_s)
    assert recovered_s <= HEALED_WITHIN_S
    assert max(health.took_s for health in healths) < ANSWERS_WITHIN_S
    assert await table.value("SELECT count(*) FROM retry_instance WHERE gone_at IS NULL") == 2


DEADLOCKS = """
CREATE SEQUENCE deadlocks;
GRANT ALL ON SEQUENCE deadlocks TO PUBLIC;
CREATE FUNCTION deadlock() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('deadlocks') % 50 = 0 THEN
        RAISE EXCEPTION 'deadlock detected' USING ERRCODE = 'deadlock_detected';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER deadlocks BEFORE INSERT OR UPDATE ON retry_queue FOR EACH ROW EXECUTE FUNCTION deadlock();
"""


async def test_deadlocks_cost_nothing(
    start_service: StartService, upstream: Upstream, table: Table, postgres: PrivatePostgres
) -> None:
    """Again and again the server sacrifices a statement of ours, as it does in a deadlock."""
    upstream.declare("orders", RETRY_QUEUE)
    service = await start_service(RABBITMQ_PREFETCH="100")

    with Load(upstream, requests(), per_second=200) as load:
        await flowing(service)
        postgres.sql(DEADLOCKS, table.database.name)
        await eventually(
            lambda: table.value("SELECT last_value > 2000 FROM deadlocks"), within=timedelta(seconds=40)
        )
        postgres.sql("DROP TRIGGER deadlocks ON retry_queue", table.database.name)
        await flowing(service)
        await accounts(load, upstream, table, [service], exactly_once=True)

    assert "deadlock detected" in service.log_text()


def limit_file_size(postgres: PrivatePostgres, limit: str) -> None:
    """Let no file of the server grow beyond `limit`, in bytes, or "unlimited"."""
    account = unprivileged_account()  # whose processes they are, if the tests are run by root
    for pid in (postgres.pid, *children_of(postgres.pid)):
        command = ["prlimit", f"--pid={pid}", f"--fsize={limit}:"]
        done = subprocess.run(
            command,
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
        )
        # A child may have come to its end since they were listed.
        assert done.returncode == 0 or not Path(f"/proc/{pid}").exists()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_disk_that_is_full_stops_the_intake_and_nothing_else_until_there_is_room(
    start_service: StartService,
    upstream: Upstream,
    table: Table,
    postgres: PrivatePostgres,
    record_property: Report,
) -> None:
    """The server may not let its files grow: it fails like one on a full disk, and nobody else does."""
    upstream.declare("orders", RETRY_QUEUE)
    service = await start_service()
    big = [(new_id(), 3_000_000) for _ in range(12)]
    bodies = [
        make_request(message_id=message_id, original_payload=encoded(payload_of(message_id, size)))
        for message_id, size in big
    ]
    upstream.ask(*bodies[:6])
    await upstream.filled("orders", 6)

    watch = Watch(service)
    limit_file_size(postgres, str(16 * 2**20))
    try:
        upstream.ask(*bodies[6:])
        await eventually(lambda: watch.complaints()["Failed to save retry task"] >= 4)
        await watch.stays_calm_until(6)
        said = watch.said()
    finally:
        limit_file_size(postgres, "unlimited")
    freed_at = time()
    recovered_s = await first_retry_s(table, freed_at)
    await upstream.filled("orders", 12)
    await eventually(table.settled)

    record_property("first_retry_after_freed_s", recovered_s)
    record_property("said", said.splitlines()[0])
    assert recovered_s <= HEALED_WITHIN_S
    assert sorted(message.message_id for message in upstream.take("orders")) == sorted(
        message_id for message_id, _ in big
    )
