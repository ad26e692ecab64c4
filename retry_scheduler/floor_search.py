"""Finds where pending rows begin, when searching from the start has become slow.

    no floor --(a search was slow)--> floor --(a search from the start was quick)--> no floor

It becomes slow when many settled rows wait for a vacuum that some old transaction holds up. Usually there is
no floor, and a row that an operator has moved far into the past is found by the next look. With a floor it is
found by the next search from the start, if that gets through; the searches between begin at the floor and
only raise it.
"""

import asyncio
import time
from datetime import datetime

import structlog

from retry_scheduler.errors import Unavailable
from retry_scheduler.observability import events
from retry_scheduler.repository import LONG_AGO, Repository

log = structlog.get_logger()

# Walking over some ten thousand dead index entries takes about this long.
SLOW_SEARCH_S = 0.02

# It may take as long as a statement may, and fail: while many dead entries remain, not every time.
SEARCH_ALL_EVERY_S = 60.0


class FloorSearch:
    """Knows a due time below which nothing is pending: LONG_AGO if searching from the start is quick."""

    def __init__(self, repository: Repository, *, every_s: float) -> None:
        self._repository = repository
        self._every_s = every_s
        self._claimed = False
        self._searched_all_at_s = float("-inf")
        self.floor: datetime = LONG_AGO

    def note_claim(self) -> None:
        """Note that rows were claimed, and leave dead entries behind."""
        self._claimed = True

    async def run(self) -> None:
        """Search now and then, until cancelled; without a floor, only after a claim."""
        while True:
            await asyncio.sleep(self._every_s)
            if self._claimed or self.floor != LONG_AGO:
                self._claimed = False
                await self._search()

    async def _search(self) -> None:
        began_s = time.monotonic()
        from_floor = self.floor != LONG_AGO and began_s - self._searched_all_at_s < SEARCH_ALL_EVERY_S
        if not from_floor:
            self._searched_all_at_s = began_s
        try:
            floor = await self._repository.search_floor(self.floor if from_floor else LONG_AGO)
        except Unavailable as problem:  # the floor that is known holds until the next search
            log.error(events.CLAIM_FAILED, error=problem.problem)
            return
        slow = time.monotonic() - began_s > SLOW_SEARCH_S
        self.floor = floor if slow or from_floor else LONG_AGO
