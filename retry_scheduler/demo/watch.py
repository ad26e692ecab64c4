"""Looks at what the service does, from outside: its tables, and the queue of messages for people.

Reads only. Messages on manual-review.pending are read without acknowledging them, so that they are
back in the queue as soon as the watch ends.
"""

import asyncio
import base64
import json
from contextlib import suppress

import asyncpg

from retry_scheduler.assembly import database_address
from retry_scheduler.broker.intake_link import IntakeLink
from retry_scheduler.database import Database
from retry_scheduler.demo.evidence import Quarantined, ReviewCopy, Row
from retry_scheduler.demo.team import give_up
from retry_scheduler.settings import Settings

LOOK_EVERY_S = 0.15

# More than will ever be there: all are held unacknowledged.
PREFETCH = 10_000

ROWS = """
SELECT message_id::text, retry_count, max_retries, status, created_at, next_retry_at, finished_at, last_error
  FROM retry_queue
 ORDER BY id"""
QUARANTINED = """
SELECT id, field, raw_body, received_at, delivered_at
  FROM retry_quarantine
 ORDER BY id"""


class Watch:
    """rows, quarantined: as of the last look. copies: what has come for people so far."""

    def __init__(self, settings: Settings) -> None:
        self.rows: list[Row] = []
        self.quarantined: list[Quarantined] = []
        self.copies: list[ReviewCopy] = []
        self._database = Database(database_address(settings), pool_min=0, pool_max=1)
        self._intake = IntakeLink(
            settings.rabbitmq_url.get_secret_value(),
            queue=settings.manual_review_queue,
            queues=(),
            prefetch=PREFETCH,
            name="demo: people",
            on_problem=give_up,
        )

    async def look_at_tables(self) -> None:
        """Look again and again until cancelled. Raises Unavailable if the database goes away."""
        async with self._database.session() as connection:
            while True:
                await self._look(connection)
                await asyncio.sleep(LOOK_EVERY_S)

    async def look_once(self) -> None:
        """Look at the tables now. Raises Unavailable."""
        async with self._database.session() as connection:
            await self._look(connection)

    async def read_copies(self) -> None:
        """Read what comes for people until cancelled. Raises an ExceptionGroup of Unavailable."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._intake.run())
            while True:
                self.copies += [review_copy(message.body) for message in await self._intake.take()]

    async def _look(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self.rows = [Row(*row) for row in await connection.fetch(ROWS)]
        self.quarantined = [
            Quarantined(
                row["id"],
                message_id_in(row["raw_body"]),
                row["field"],
                row["received_at"],
                row["delivered_at"],
            )
            for row in await connection.fetch(QUARANTINED)
        ]


def review_copy(body: bytes) -> ReviewCopy:
    """Return what a message for people is about. The payload of a malformed one is the whole request."""
    told = json.loads(body)
    message_id = told["message_id"]
    if message_id is None and told["original_payload"] is not None:
        message_id = message_id_in(base64.b64decode(told["original_payload"]))
    return ReviewCopy(message_id, told["reason"])


def message_id_in(request: bytes) -> str | None:
    """Return the message_id in a malformed request, if there is one that can be read."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads(request)["message_id"])
    return None
