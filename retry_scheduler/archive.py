"""Moves attempts that were finished long ago from retry_queue into retry_queue_archive.

One short statement after another, each committed by itself, with a pause after it that is several times
as long: what is due beside it hardly notices. A pending row is never touched, and a row that somebody
holds is passed over. So any number of runs may be under way at once, and a run may end at any moment.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import structlog

from retry_scheduler.database import CALL_TIMEOUT_S, SESSION, Database
from retry_scheduler.errors import RetrySchedulerError
from retry_scheduler.observability import events
from retry_scheduler.sql import query

log = structlog.get_logger()

# What a statement aims to take. Longer and claims wait for a processor or the disk; shorter and most of
# the time goes into commits.
AIM_S = 0.01
FIRST_ROWS = 50
MOST_ROWS = 500
MOST_BYTES = 8 * 1024 * 1024

# Pauses are this many times as long as the statement before: archiving takes a fortieth of one connection.
# At a tenth, what it writes (and vacuum after it) made commits wait: live traffic was twice as late.
PAUSE_TIMES = 39
SHORTEST_PAUSE_S = 0.01

# Soon after the start, because a service that is restarted every day has to archive, too; not at once,
# because what has become due in the meantime comes first.
FIRST_AFTER = timedelta(seconds=5)
EVERY = timedelta(days=1)
AFTER_FAILURE = timedelta(minutes=10)

_BEFORE_ALL = -(2**63)

_SETTINGS = {
    **SESSION,
    "application_name": "retry-scheduler archive",
    # Both tables are reached by their keys alone. A plan that was made for a small table, also by the
    # trigger, must not read all of a large one.
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_custom_plan",
}


@dataclass(frozen=True, slots=True)
class Archived:
    """What a run has done. longest: its longest statement."""

    rows: int
    took: timedelta
    longest: timedelta


async def archive_finished(
    database: Database, retention: timedelta, stop: asyncio.Event | None = None
) -> Archived:
    """Move all that was finished longer than `retention` ago, or what can be moved until `stop` is set.

    Opens a connection of its own. Raises Unavailable; what was moved before stays moved.
    """
    stop = stop or asyncio.Event()
    began_s = time.monotonic()
    after_id, look_rows, rows, longest_s = _BEFORE_ALL, FIRST_ROWS, 0, 0.0
    async with database.session(settings=_SETTINGS) as connection:
        while not stop.is_set():
            sent_at_s = time.monotonic()
            (row,) = await connection.fetch(
                query("archive_finished"), after_id, look_rows, retention, MOST_BYTES, timeout=CALL_TIMEOUT_S
            )
            took_s = time.monotonic() - sent_at_s
            longest_s = max(longest_s, took_s)
            rows += row["moved"]
            if row["done"]:
                break
            after_id = row["last_id"]
            if took_s > AIM_S:
                look_rows = max(look_rows // 2, 1)
            elif took_s < AIM_S / 2:
                look_rows = min(look_rows * 2, MOST_ROWS)
            await _wait(stop, max(took_s * PAUSE_TIMES, SHORTEST_PAUSE_S))
    return Archived(rows, timedelta(seconds=time.monotonic() - began_s), timedelta(seconds=longest_s))


async def archive_daily(
    database: Database, retention: timedelta, stop: asyncio.Event, *, first_after: timedelta = FIRST_AFTER
) -> None:
    """Archive soon, then once a day until `stop` is set. A run that fails is logged and tried again later."""
    await _wait(stop, first_after.total_seconds())
    while not stop.is_set():
        pause = EVERY
        try:
            archived = await archive_finished(database, retention, stop)
            log.info(events.ARCHIVED, rows=archived.rows, took_s=round(archived.took.total_seconds(), 3))
        except RetrySchedulerError as problem:
            log.warning(events.ARCHIVE_FAILED, error=str(problem))
            pause = AFTER_FAILURE
        except Exception:  # a bug of ours must not keep retries from being made
            log.exception(events.ARCHIVE_FAILED)
            pause = AFTER_FAILURE
        await _wait(stop, pause.total_seconds())


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
