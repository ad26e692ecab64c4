"""Asks both servers how the service stands, without changing anything and in bounded time.

Counts end at COUNT_UP_TO, and a large table is sampled. Nothing here needs a running service.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from retry_scheduler.broker.topology import queue_states
from retry_scheduler.database import SESSION, Database
from retry_scheduler.errors import StatementRefused, Unavailable, UnusableSchema
from retry_scheduler.sql import query

COUNT_UP_TO = 1_000_000

# Counting every row of a table with so many pages, about a million rows, takes a second or two. Beyond,
# fewer pages are read at random, since reading at random is slower.
COUNTED_PAGES = 60_000
SAMPLED_PAGES = 10_000
MOST_GROUPS = 200

LATELY = timedelta(minutes=5)
LATENESS_AMONG = 20_000

WITHIN_S = 60.0
_SETTINGS = {
    **SESSION,
    "application_name": "retry-scheduler status",
    "default_transaction_read_only": "on",
    "statement_timeout": "20s",
}


class Server(msgspec.Struct):
    """Whether a server answers. problem: why not."""

    up: bool
    problem: str | None = None


class Attempts(msgspec.Struct):
    """What waits. due: would be sent now. Neither is counted further than counted_up_to."""

    pending: int
    due: int
    oldest_due_at: datetime | None
    oldest_due_s: float | None
    counted_up_to: int


class Group(msgspec.Struct):
    """Attempts of one queue in one status."""

    queue: str
    status: str
    attempts: int


class ByQueue(msgspec.Struct):
    """The largest groups, at most MOST_GROUPS. estimated: from a sample of the table."""

    estimated: bool
    groups: list[Group]


class Lateness(msgspec.Struct):
    """Of the attempts executed within the last window_s, seconds from due to settled; None without any."""

    window_s: float
    executed: int
    p50_s: float | None
    p99_s: float | None
    max_s: float | None


class Review(msgspec.Struct):
    """Malformed input that was kept, and how many of it manual review has not got yet."""

    quarantined: int
    quarantine_waiting: int


class RegisteredInstance(msgspec.Struct):
    """An instance in the register. silent_s: since its last beat."""

    name: str
    started_at: datetime
    silent_s: float


class OldestTransaction(msgspec.Struct):
    """Who keeps VACUUM from cleaning up. hidden_sessions: of other roles, which this one may not see."""

    who: str | None
    open_s: float | None
    hidden_sessions: int
    replication_slot_age: int | None


class TableSize(msgspec.Struct):
    """Sizes of a table; rows and dead_rows are the statistics' estimates."""

    name: str
    rows: int
    dead_rows: int
    total_bytes: int
    index_bytes: int
    vacuumed_at: datetime | None


class IndexSize(msgspec.Struct):
    """Size of an index."""

    name: str
    bytes: int


class DatabaseFigures(msgspec.Struct):
    """What PostgreSQL knows."""

    schema_version: int
    attempts: Attempts
    by_queue: ByQueue
    lateness: Lateness
    review: Review
    archived: int
    instances: list[RegisteredInstance]
    oldest_transaction: OldestTransaction
    tables: list[TableSize]
    indexes: list[IndexSize]


class Queue(msgspec.Struct):
    """One of our queues at the broker; messages and consumers are None if it does not exist."""

    name: str
    messages: int | None
    consumers: int | None


class Status(msgspec.Struct):
    """Everything. stored, queues: None if that server is away."""

    postgresql: Server
    rabbitmq: Server
    stored: DatabaseFigures | None
    queues: list[Queue] | None


async def take_status(database: Database, url: str, queues: Sequence[str], *, name: str) -> Status:
    """Return how everything stands; a server that is away is part of the answer.

    url: of the broker. Raises UnusableSchema if the tables are not there or may not be read.
    """
    status = Status(Server(True), Server(True), None, None)
    try:
        status.stored = await _stored(database)
    except StatementRefused as problem:
        raise UnusableSchema(
            f"cannot read the tables: {problem.problem}. See `retry-scheduler check`."
        ) from None
    except Unavailable as problem:
        status.postgresql = Server(False, problem.problem)
    try:
        status.queues = [
            Queue(queue, state.messages if state else None, state.consumers if state else None)
            for queue, state in (await queue_states(url, queues, name=name)).items()
        ]
    except Unavailable as problem:
        status.rabbitmq = Server(False, problem.problem)
    return status


async def _stored(database: Database) -> DatabaseFigures:
    async with database.session(within_s=WITHIN_S, settings=_SETTINGS) as connection:

        async def rows(name: str, *arguments: Any) -> list[dict[str, Any]]:
            return [dict(row) for row in await connection.fetch(query(name), *arguments)]

        (due,) = await rows("due_figures", COUNT_UP_TO)
        tables = await rows("table_figures")
        pages = next(table["pages"] for table in tables if table["name"] == "retry_queue")
        percent = 100.0 if pages <= COUNTED_PAGES else 100.0 * SAMPLED_PAGES / pages
        groups = await rows("attempt_groups", percent, MOST_GROUPS)
        (late,) = await rows("recent_lateness", LATENESS_AMONG, LATELY)
        (review,) = await rows("review_figures", COUNT_UP_TO)
        instances = await rows("instance_figures")
        (oldest,) = await rows("oldest_transaction")
        indexes = await rows("index_figures")
    return DatabaseFigures(
        schema_version=review["schema_version"],
        attempts=Attempts(**due, counted_up_to=COUNT_UP_TO),
        by_queue=ByQueue(
            percent < 100,
            [
                Group(row["original_queue"], row["status"], round(row["attempts"] * 100 / percent))
                for row in groups
            ],
        ),
        lateness=Lateness(LATELY.total_seconds(), **late),
        review=Review(review["quarantined"], review["quarantine_waiting"]),
        archived=review["archived"],
        instances=[RegisteredInstance(**row) for row in instances],
        oldest_transaction=OldestTransaction(
            oldest["who"], oldest["open_s"], oldest["hidden"], oldest["slot_age"]
        ),
        tables=[TableSize(**{name: row[name] for name in TableSize.__struct_fields__}) for row in tables],
        indexes=[IndexSize(**row) for row in indexes],
    )
