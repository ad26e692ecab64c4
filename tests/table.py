"""The database as an operator sees it: SQL, on a connection of its own for each statement."""

from dataclasses import dataclass
from typing import Any

import asyncpg

from tests.servers import Database


@dataclass(frozen=True)
class Table:
    """What stands in the test's database."""

    database: Database

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run one statement and return its rows."""
        connection = await asyncpg.connect(self.database.dsn, timeout=5)
        try:
            return await connection.fetch(statement, *arguments, timeout=30)
        finally:
            await connection.close(timeout=5)

    async def row(self, statement: str, *arguments: Any) -> asyncpg.Record:
        """Run one statement that has exactly one row as its answer."""
        rows = await self.fetch(statement, *arguments)
        assert len(rows) == 1, f"{len(rows)} rows"
        return rows[0]

    async def value(self, statement: str, *arguments: Any) -> Any:
        """Run one statement that has exactly one value as its answer."""
        return (await self.row(statement, *arguments))[0]

    async def statuses(self) -> dict[str, int]:
        """How many attempts stand in which state."""
        rows = await self.fetch("SELECT status, count(*) FROM retry_queue GROUP BY status")
        return {row["status"]: row["count"] for row in rows}

    async def settled(self) -> bool:
        """Whether no attempt is pending and no malformed message waits for manual review."""
        waiting = await self.value(
            "SELECT (SELECT count(*) FROM retry_queue WHERE status = 'pending')"
            " + (SELECT count(*) FROM retry_quarantine WHERE delivered_at IS NULL)"
        )
        return bool(waiting == 0)
