"""Finished attempts move to the archive, by command and by themselves; what is due does not wait for it."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest
from structlog.testing import capture_logs

from retry_scheduler import archive
from retry_scheduler.archive import archive_daily, archive_finished
from retry_scheduler.database import Database
from retry_scheduler.observability import events
from retry_scheduler.service import Service
from retry_scheduler.settings import load_settings
from tests import servers
from tests.command import CONFIG, OK, call, settings_for
from tests.factories import make_request, new_id
from tests.service_process import StartService
from tests.table import Table
from tests.upstream import Load, Receiver, Upstream
from tests.waiting import eventually

pytest_plugins = ("tests.fixtures",)

OPERATIONS = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()

RETENTION = timedelta(days=30)

# No statement of anybody's may wait for a lock longer than that.
WAITS_AT_MOST_S = 0.1

FILL = """
WITH made AS (
    INSERT INTO retry_queue (message_id, original_queue, retry_count, max_retries, next_retry_at, created_at,
                             finished_at, status, payload_bytes)
    SELECT gen_random_uuid(), 'old', 0, 3, at, at, at, $2, $3
      FROM (SELECT now() - interval '31 days 1 hour' AS at FROM generate_series(1, $1::int)) AS old
    RETURNING id
)
INSERT INTO retry_payload SELECT id, decode(repeat('00', $3), 'hex') FROM made
"""


@pytest.fixture
async def session(opened: Database, database: servers.Database) -> AsyncIterator[asyncpg.Connection]:
    """An operator's session."""
    connection = await asyncpg.connect(database.dsn)
    yield connection
    await connection.close()


async def fill(table: Table, count: int, *, status: str = "retried", payload_bytes: int = 10) -> None:
    """Store attempts that were created and finished 31 days ago."""
    await table.fetch(FILL, count, status, payload_bytes)


async def insert(table: Table, status: str, *, created: str, finished: str | None) -> int:
    """Store one attempt with its body, and return its id. Ages as PostgreSQL writes intervals."""
    row_id: int = await table.value(
        "INSERT INTO retry_queue (message_id, original_queue, error_reason, retry_count, max_retries,"
        " next_retry_at, created_at, finished_at, status, payload_bytes, traceparent)"
        " VALUES ($1, 'orders', 'timeout', 1, 3, now(), now() - $2::text::interval,"
        " now() - $3::text::interval, $4, 1, '00-1-2-01') RETURNING id",
        new_id(),
        created,
        finished,
        status,
    )
    await table.fetch("INSERT INTO retry_payload VALUES ($1, 'x')", row_id)
    return row_id


async def archived_ids(table: Table) -> list[int]:
    return [row["id"] for row in await table.fetch("SELECT id FROM retry_queue_archive ORDER BY id")]


async def test_what_was_finished_long_ago_moves_whole_and_everything_else_stays(
    opened: Database, table: Table
) -> None:
    moving = [
        await insert(table, status, created="40 days", finished="31 days")
        for status in ("retried", "failed", "discarded")
    ]
    # An operator's UPDATE need not know of finished_at.
    moving.append(await insert(table, "discarded", created="31 days", finished=None))
    staying = [
        await insert(table, "pending", created="400 days", finished=None),
        await insert(table, "retried", created="40 days", finished="29 days"),
        await insert(table, "failed", created="29 days", finished=None),
    ]
    moving.append(await insert(table, "retried", created="31 days", finished="31 days"))
    before = await table.fetch("SELECT * FROM retry_queue WHERE id = ANY ($1) ORDER BY id", moving)

    first = await archive_finished(opened, RETENTION)
    again = await archive_finished(opened, RETENTION)

    assert (first.rows, again.rows) == (len(moving), 0)
    assert await table.fetch("SELECT * FROM retry_queue_archive ORDER BY id") == before
    for name in ("retry_queue", "retry_payload"):
        assert [row["id"] for row in await table.fetch(f"SELECT id FROM {name} ORDER BY id")] == staying


async def test_a_column_that_a_newer_version_has_added_keeps_its_value(
    opened: Database, table: Table
) -> None:
    for name in ("retry_queue", "retry_queue_archive"):
        await table.fetch(f"ALTER TABLE {name} ADD COLUMN added text")
    await fill(table, 1)
    await table.fetch("UPDATE retry_queue SET added = 'kept'")

    await archive_finished(opened, RETENTION)

    assert await table.value("SELECT added FROM retry_queue_archive") == "kept"


async def test_large_bodies_make_small_batches_and_one_beyond_the_limit_moves_alone(
    opened: Database, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    await fill(table, 30, payload_bytes=400)
    await fill(table, 3, payload_bytes=2000)
    # Notes how many rows each statement deletes, and the bytes of their bodies.
    await table.fetch("CREATE TABLE deleted (count bigint, bytes bigint)")
    await table.fetch(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO deleted SELECT count(*), sum(payload_bytes) FROM gone HAVING count(*) > 0;"
        " RETURN NULL; END $$"
    )
    await table.fetch(
        "CREATE TRIGGER note AFTER DELETE ON retry_queue REFERENCING OLD TABLE AS gone"
        " FOR EACH STATEMENT EXECUTE FUNCTION note()"
    )

    async with asyncio.timeout(30):
        done = await archive_finished(opened, RETENTION)

    batches = await table.fetch("SELECT count, bytes FROM deleted")
    assert done.rows == 33
    assert all(batch["bytes"] <= 1000 or batch["count"] == 1 for batch in batches)
    assert max(batch["count"] for batch in batches) == 2


async def test_a_row_that_somebody_holds_is_passed_over_at_once_and_an_operators_change_to_it_counts(
    opened: Database, table: Table, session: asyncpg.Connection
) -> None:
    await fill(table, 50)
    ids = [row["id"] for row in await table.fetch("SELECT id FROM retry_queue ORDER BY id")]
    reopened, locked = ids[10], ids[20]
    async with session.transaction():
        await session.execute("UPDATE retry_queue SET status = 'pending' WHERE id = $1", reopened)
        await session.execute("SELECT 1 FROM retry_queue WHERE id = $1 FOR UPDATE", locked)
        async with asyncio.timeout(5):
            first = await archive_finished(opened, RETENTION)
    second = await archive_finished(opened, RETENTION)

    assert (first.rows, second.rows) == (48, 1)
    assert await table.statuses() == {"pending": 1}
    assert await table.value("SELECT id FROM retry_payload") == reopened
    assert locked in await archived_ids(table)


async def test_several_that_archive_at_once_share_the_rows_and_none_moves_twice(
    opened: Database, table: Table
) -> None:
    await fill(table, 3000)

    done = await asyncio.gather(*(archive_finished(opened, RETENTION) for _ in range(3)))

    moved = await archived_ids(table)
    assert sum(each.rows for each in done) == len(moved) == len(set(moved)) == 3000


async def test_a_run_ends_when_told_to_and_keeps_what_it_has_moved(opened: Database, table: Table) -> None:
    await fill(table, 20_000)
    stop = asyncio.Event()

    running = asyncio.create_task(archive_finished(opened, RETENTION, stop))
    await eventually(lambda: table.value("SELECT count(*) > 0 FROM retry_queue_archive"))
    stop.set()
    async with asyncio.timeout(5):
        done = await running

    assert 0 < done.rows < 20_000
    assert len(await archived_ids(table)) == done.rows


async def test_a_run_that_fails_is_logged_and_tried_again(
    opened: Database, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "AFTER_FAILURE", timedelta(milliseconds=50))
    await fill(table, 10)
    await table.fetch("ALTER TABLE retry_queue_archive RENAME TO elsewhere")
    stop = asyncio.Event()
    with capture_logs() as logged:
        running = asyncio.create_task(archive_daily(opened, RETENTION, stop, first_after=timedelta(0)))
        await eventually(lambda: [e for e in logged if e["event"] == events.ARCHIVE_FAILED])
        await table.fetch("ALTER TABLE elsewhere RENAME TO retry_queue_archive")
        done = await eventually(lambda: [e for e in logged if e["event"] == events.ARCHIVED])
        stop.set()
        async with asyncio.timeout(5):
            await running

    assert [event["rows"] for event in done] == [10]
    assert {event["log_level"] for event in logged if event["event"] == events.ARCHIVE_FAILED} == {"warning"}


async def test_a_running_service_archives_by_itself_and_nothing_beside_it_waits_is_lost_or_sent_twice(
    opened: Database, start_service: StartService, upstream: Upstream, table: Table, broker_url: str
) -> None:
    await fill(table, 20_000)
    service = await start_service()
    upstream.declare("orders")
    settings = settings_for(table.database, broker_url)
    bodies = ((message_id, make_request(message_id=message_id)) for message_id in iter(new_id, None))
    with Receiver(upstream, "orders") as received, Load(upstream, bodies, per_second=100) as load:
        over = asyncio.Event()
        watching = asyncio.create_task(longest_wait_s(table, over))
        await eventually(
            lambda: table.value("SELECT count(*) > 0 FROM retry_queue_archive"), within=timedelta(seconds=20)
        )
        by_hand = await asyncio.to_thread(call, "archive", **settings)  # beside the one that is under way
        await eventually(
            lambda: service.log_events(events.ARCHIVED),
            within=timedelta(seconds=30),
            every=timedelta(milliseconds=200),
        )
        over.set()
        waited_s = await watching
        load.finish()
        await eventually(table.settled)
        await eventually(lambda: len(received) >= len(load.accepted))

    (event,) = service.log_events(events.ARCHIVED)
    assert (by_hand.returncode, by_hand.stderr) == (OK, "")
    assert by_hand.stdout.startswith("archived ")
    assert event["rows"] + int(by_hand.stdout.split()[1].replace(",", "")) == 20_000
    assert len(set(await archived_ids(table))) == 20_000
    assert await table.statuses() == {"retried": len(load.accepted)}
    assert sorted(message.message_id for message in received.messages) == sorted(load.accepted)
    assert waited_s < WAITS_AT_MOST_S


async def longest_wait_s(table: Table, over: asyncio.Event) -> float:
    """Return for how many seconds, at most, a statement was seen waiting for a lock until `over` is set."""
    longest = 0.0
    connection = await asyncpg.connect(table.database.dsn)
    try:
        while not over.is_set():
            waited = await connection.fetchval(
                "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0)::float8"
                " FROM pg_locks WHERE NOT granted"
            )
            longest = max(longest, waited)
            await asyncio.sleep(0.01)  # noqa: TID251  how often it looks
    finally:
        await connection.close()
    return longest


async def test_with_retention_0_nothing_archives_unless_told_how_old(
    opened: Database, database: servers.Database, table: Table, broker_url: str
) -> None:
    await fill(table, 3)
    settings = settings_for(database, broker_url) | {"RETENTION_DAYS": "0"}
    async with asyncio.timeout(2):
        await Service(load_settings(settings))._keep_house()

    off = call("archive", **settings)
    too_young = call("archive", "--days", "32", **settings)
    told = call("archive", "--days", "31", **settings)

    assert (off.returncode, off.stdout) == (CONFIG, "")
    assert "RETENTION_DAYS" in off.stderr
    assert too_young.returncode == told.returncode == OK
    assert too_young.stdout.startswith("archived 0 attempts finished more than 32 days ago")
    assert told.stdout.startswith("archived 3 attempts finished more than 31 days ago")


async def test_the_sql_that_the_operators_page_prints_runs_and_touches_nothing_else(
    opened: Database, table: Table
) -> None:
    waiting = await insert(table, "pending", created="1 hour", finished=None)
    statements = re.findall(r"^ *```sql\n(.*?)^ *```$", OPERATIONS, re.DOTALL | re.MULTILINE)

    for text in "".join(statements).split(";"):
        if text.strip():
            await table.fetch(text)

    assert len(statements) >= 2
    assert await table.value("SELECT id FROM retry_queue WHERE status = 'pending'") == waiting
