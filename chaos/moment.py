"""Strikes at the worst moment: when rows are in hand, perhaps published, and not settled yet.

At a random moment of a quiet system there is hardly ever such a row. Whoever cannot find the moment within
a second strikes anyway.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import asyncpg

from chaos.bed import Place
from chaos.schedule import Strike

WITHIN_S = 1.0
# Requests in step come by the dozen: wait for such a batch rather than for a single row.
ROWS = 5

# From a claim to its settlement: somewhere in between lies the publication.
CLAIM_TO_SETTLEMENT_S = 0.012

_IN_HAND = """
SELECT count(*) FROM retry_queue AS task JOIN retry_instance AS owner ON owner.id = task.claimed_by
 WHERE task.status = 'pending' AND task.claimed_until > now() AND ($1 = '' OR owner.name LIKE '%:' || $1)
"""
_LOCK = "BEGIN; SET LOCAL lock_timeout = '3s'; LOCK TABLE retry_queue IN ACCESS EXCLUSIVE MODE"

# While servers come and go. The last one comes when the server's farewell arrives in the middle of a
# statement.
TROUBLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


def strike_in_time(place: Place, strike: Strike, blow: Callable[[], None], *, pid: int) -> None:
    """Call `blow` once, when the process `pid` has rows in hand. strike.at_once: now."""

    struck = False

    async def wait() -> None:
        nonlocal struck
        connection = await connect(place)
        try:
            await _rows_in_hand(connection, strike, str(pid))
            struck = True
            blow()  # here and not later: the moment lasts for milliseconds
        finally:
            connection.terminate()

    if not strike.at_once:
        with suppress(*TROUBLE):
            asyncio.run(wait())
    if not struck:
        blow()


async def hold_table_lock(place: Place, strike: Strike, locked: Callable[[], None]) -> None:
    """Lock retry_queue when rows are in hand, call `locked`, and hold the lock while the strike lasts.

    Another fault may end the session, and the lock with it.
    """
    with suppress(*TROUBLE):
        connection = await connect(place)
        try:
            if not strike.at_once:
                with suppress(TimeoutError):
                    await _rows_in_hand(connection, strike, "")
            await connection.execute(_LOCK)
            locked()
            await asyncio.sleep(strike.lasts_s)
        finally:
            connection.terminate()


async def connect(place: Place) -> asyncpg.Connection:
    """Return a superuser's connection that waits for no lock. Raises one of TROUBLE."""
    connecting: Awaitable[asyncpg.Connection] = asyncpg.connect(
        host=place.postgres.host,
        port=place.postgres.port,
        user=place.postgres.superuser,
        database=place.name,
        timeout=WITHIN_S,
        server_settings={"lock_timeout": "50ms"},  # a locked table tells nothing
    )
    return await connecting


async def _rows_in_hand(connection: asyncpg.Connection, strike: Strike, pid: str) -> None:
    dice = random.Random(str(strike))
    statement = await connection.prepare(_IN_HAND)
    async with asyncio.timeout(WITHIN_S):
        while await statement.fetchval(pid) < ROWS:
            pass
    time.sleep(dice.uniform(0, CLAIM_TO_SETTLEMENT_S))  # noqa: ASYNC251  nothing else runs in this loop
