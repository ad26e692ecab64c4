"""The tables of docs/contract.md: what operators' SQL relies on, in a freshly migrated database."""

import asyncpg
import pytest

from retry_scheduler.database import Database, DatabaseAddress
from retry_scheduler.schema import migrate
from tests.factories import new_id
from tests.table import Table

pytest_plugins = ("tests.fixtures",)

PROMISED_COLUMNS = {
    "id": "bigint",
    "message_id": "uuid",
    "original_queue": "text",
    "error_reason": "text",
    "retry_count": "integer",
    "max_retries": "integer",
    "next_retry_at": "timestamp with time zone",
    "created_at": "timestamp with time zone",
    "status": "text",
}

INSERT = (
    "INSERT INTO retry_queue"
    " (message_id, original_queue, retry_count, max_retries, next_retry_at, status, payload_bytes)"
    " VALUES ($1, $2, $3, $4, $5::text::timestamptz, $6, $7) RETURNING id"
)


async def insert(
    table: Table,
    *,
    queue: str = "orders",
    count: int = 0,
    limit: int = 3,
    at: str = "now",
    status: str = "pending",
) -> int:
    row_id: int = await table.value(INSERT, new_id(), queue, count, limit, at, status, 0)
    await table.fetch("INSERT INTO retry_payload VALUES ($1, 'payload')", row_id)
    return row_id


async def columns(table: Table, name: str) -> list[tuple[str, str]]:
    rows = await table.fetch(
        "SELECT column_name, data_type FROM information_schema.columns"
        " WHERE table_name = $1 ORDER BY ordinal_position",
        name,
    )
    return [(row[0], row[1]) for row in rows]


async def test_the_queue_has_the_promised_columns_first_and_the_archive_has_the_same_in_the_same_order(
    migrated: Table,
) -> None:
    queue, archive = await columns(migrated, "retry_queue"), await columns(migrated, "retry_queue_archive")

    assert dict(queue[: len(PROMISED_COLUMNS)]) == PROMISED_COLUMNS
    assert archive == queue
    assert {kind for _, kind in queue if "time" in kind} == {"timestamp with time zone"}


async def test_the_index_of_due_rows_covers_pending_rows_only(migrated: Table) -> None:
    definition = await migrated.value(
        "SELECT indexdef FROM pg_indexes"
        " WHERE tablename = 'retry_queue' AND indexname = 'idx_retry_next_retry'"
    )

    assert "(next_retry_at" in definition
    assert definition.endswith("WHERE (status = 'pending'::text)")


@pytest.mark.parametrize("status", ["pending", "retried", "failed", "discarded"])
async def test_each_promised_status_is_possible(migrated: Table, status: str) -> None:
    await insert(migrated, status=status)

    assert await migrated.statuses() == {status: 1}


@pytest.mark.parametrize(
    "nonsense",
    [
        {"status": "x"},
        {"status": "Pending"},
        {"count": -1},
        {"limit": -1},
        {"limit": 1001},
        {"at": "infinity"},
        {"at": "-infinity"},
        {"queue": ""},
        {"queue": "é" * 128},
    ],
    ids=str,
)
async def test_a_row_edited_by_hand_into_nonsense_is_refused(
    migrated: Table, nonsense: dict[str, object]
) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await insert(migrated, **nonsense)  # type: ignore[arg-type]


async def test_an_attempt_can_be_stored_once_only(migrated: Table) -> None:
    message_id = new_id()
    await migrated.fetch(INSERT, message_id, "orders", 1, 3, "now", "pending", 0)

    with pytest.raises(asyncpg.UniqueViolationError):
        await migrated.fetch(INSERT, message_id, "orders", 1, 3, "now", "pending", 0)


async def test_deleting_rows_deletes_their_payloads_and_no_others(migrated: Table) -> None:
    ids = [await insert(migrated) for _ in range(5)]

    await migrated.fetch("DELETE FROM retry_queue WHERE id = ANY ($1)", ids[:2])
    await migrated.fetch("DELETE FROM retry_queue WHERE id = $1", ids[2])

    left = await migrated.fetch("SELECT id FROM retry_payload ORDER BY id")
    assert [row["id"] for row in left] == ids[3:]


async def test_a_row_deleted_and_its_archive_copy_are_the_same(migrated: Table) -> None:
    row_id = await insert(migrated, status="retried")
    before = await migrated.row("SELECT * FROM retry_queue WHERE id = $1", row_id)

    await migrated.fetch("INSERT INTO retry_queue_archive SELECT * FROM retry_queue")
    await migrated.fetch("DELETE FROM retry_queue")

    assert tuple(await migrated.row("SELECT * FROM retry_queue_archive")) == tuple(before)


async def test_migrating_again_changes_nothing(migrated: Table) -> None:
    where = migrated.database
    address = DatabaseAddress(where.host, where.port, where.name, where.user, where.password, tls=False)

    assert await migrate(Database(address, pool_min=0, pool_max=1)) == []
