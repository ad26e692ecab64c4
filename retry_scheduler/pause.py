"""Holds back claiming after a restore, and says what would happen if it did not.

A backup knows nothing of what was sent after it was made: its pending attempts would all be sent again.
So the service can start paused. It takes requests, and claims nothing until an operator releases it.
Keeps out of claiming itself: the scheduler is told when it may begin.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from retry_scheduler.errors import Unavailable
from retry_scheduler.observability import events
from retry_scheduler.repository import DueFigures, Repository

log = structlog.get_logger()

LOOK_EVERY_S = 1.0
# Counting a large table may take this share of the time.
LOOKING_SHARE = 0.05
LOG_EVERY_S = 60.0
# Counting a restored table that is not in memory may take longer than a statement may.
COUNT_UP_TO = (1_000_000, 10_000)

HOW = "SIGUSR1 releases it, or a restart without START_PAUSED"


class Pause:
    """Whether claiming is held back. Once released it stays released until the process ends."""

    def __init__(self, repository: Repository, *, paused: bool, on_release: Callable[[], None]) -> None:
        self._repository = repository
        self._on_release = on_release
        self._released = asyncio.Event()
        if not paused:
            self._released.set()
        self._figures: DueFigures | None = None

    @property
    def active(self) -> bool:
        """Whether claiming is held back now."""
        return not self._released.is_set()

    def release(self) -> None:
        """Let claiming begin; harmless when repeated."""
        if self._released.is_set():
            log.info(events.NOT_PAUSED)
            return
        self._released.set()
        log.warning(events.RELEASED)
        self._on_release()

    def reason(self) -> str:
        """Return in one sentence what would be sent at once, and how to release it."""
        figures = self._figures
        if figures is None:
            return f"paused; {HOW}"
        many = "at least " if figures.due >= figures.counted_up_to else ""
        since = f", the oldest due since {figures.oldest_due_at}" if figures.oldest_due_at else ""
        return f"paused: {many}{figures.due} retries would be sent at once{since}; {HOW}"

    def shown(self) -> dict[str, object] | None:
        """Return the figures for a page; None if not paused, or not counted yet."""
        if self._released.is_set() or self._figures is None:
            return None
        return {
            "pending": self._figures.pending,
            "due": self._figures.due,
            "oldest_due_at": self._figures.oldest_due_at,
            "counted_up_to": self._figures.counted_up_to,
        }

    async def watch(self, stop: asyncio.Event) -> None:
        """Look again and again what would be sent, until released or `stop` is set."""
        if self._released.is_set():
            return
        stopping = asyncio.create_task(stop.wait(), name="pause sees stop")
        released = asyncio.create_task(self._released.wait(), name="pause sees release")
        logged_at_s: float | None = None
        try:
            while not self._released.is_set() and not stop.is_set():
                began_s = time.monotonic()
                await self._look()
                now_s = time.monotonic()
                log_again = logged_at_s is None or now_s - logged_at_s >= LOG_EVERY_S
                if log_again and not self._released.is_set():
                    log.warning(events.PAUSED, **(self.shown() or {}), release=HOW)
                    logged_at_s = now_s
                pause_s = max(LOOK_EVERY_S, (now_s - began_s) / LOOKING_SHARE)
                await asyncio.wait((stopping, released), timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            released.cancel()

    async def _look(self) -> None:
        for limit in COUNT_UP_TO:
            with suppress(Unavailable):  # shows on /health; the last figures stay
                self._figures = await self._repository.due_figures(limit)
                return
